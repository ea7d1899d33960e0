import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import { hashFile } from '../io/fingerprint.ts'
import { loadImage } from '../io/image.ts'
import type { VideoBackend } from '../io/video.ts'
import { videoBackend } from '../io/webcodecs.ts'
import type { CausalVideoVAE } from '../models/causal-vae.ts'
import { ahead, DECODERS } from './ahead.ts'
import type { BadReason } from './bad-items.ts'
import { type Bars, findBars } from './black-bars.ts'
import { type Bucket, bucketName, type ClipInfo, checkBuckets, upscales } from './buckets.ts'
import type { ShortClips } from './dataset.ts'
import { type DatasetItem, type Listed, listDataset } from './dataset-list.ts'
import { encodeClip, latentShape } from './encode-clip.ts'
import { clipInfo, placeItem, tooShort } from './place-item.ts'

/** What was found. Those of {@link BadReason} are errors: the entry cannot be used. The others are warnings. */
export type FindingKind = BadReason | 'fps' | 'duplicate' | 'bars' | 'upscaled'

export interface Finding {
  readonly severity: 'error' | 'warning'
  readonly kind: FindingKind
  /** File and line of the entry, or the path of the file. */
  readonly place: string
  readonly message: string
}

export interface InspectOptions {
  /** Sizes to train at; without them lengths and sizes are not judged, and nothing is projected. */
  buckets?: readonly Bucket[] | undefined
  /** The rate that clips are going to be resampled to. */
  fps?: number | undefined
  /** As for opening; default `reject`. */
  short?: ShortClips | undefined
  /** Look at the first entries only. */
  limit?: number | undefined
  /** Encodes a clip of each bucket, to tell how long all will take. */
  vae?: CausalVideoVAE | undefined
  signal?: AbortSignal | undefined
  onProgress?: ((done: number, total: number) => void) | undefined
  backend?: VideoBackend | undefined
}

/** What {@link inspectDataset} found. */
export interface DatasetReport {
  readonly entries: number
  readonly usable: { readonly videos: number; readonly images: number }
  /** In the order of the entries. */
  readonly findings: readonly Finding[]
  readonly errors: number
  readonly warnings: number
  /** Frames per second of the videos, the commonest first. */
  readonly rates: readonly { readonly fps: number; readonly clips: number }[]
  readonly buckets: readonly (Bucket & { readonly clips: number })[]
  /** Projections and how they were made; null where there was too little to go by. */
  readonly cache: { readonly bytes: number; readonly how: string } | null
  readonly encoding: { readonly seconds: number; readonly how: string } | null
}

/** Longer side of the frames that are looked at. */
const LOOK = 160
/** Frames looked at where no bucket says how many are used. */
const LOOK_FRAMES = 121

interface Looked {
  readonly place: string
  readonly item?: DatasetItem
  readonly info?: ClipInfo
  readonly content?: string
  readonly bucket?: number
  readonly findings: Finding[]
}

/**
 * Looks at every entry of a data set before anything is trained on it: opens each file, decodes as much of it as training
 * would read, and compares them with one another. Nothing is written.
 *
 * @throws ERR_IO when there is no data set at `path`; ERR_OPTION for bad sizes; ERR_ABORTED. What is wrong with an entry is
 *   a finding, not an error.
 */
export async function inspectDataset(path: string, options: InspectOptions = {}): Promise<DatasetReport> {
  const { buckets, signal, onProgress } = options
  if (buckets) checkBuckets(buckets)
  const backend = options.backend ?? (await videoBackend())
  const list = await listDataset(path, options.limit)
  const began = performance.now()
  const looked: Looked[] = []
  const look = async (i: number, stop: AbortSignal): Promise<Looked> =>
    lookAt(await list.at(i), { ...options, backend, signal: stop })
  const how = { parallel: DECODERS, hold: 2 * DECODERS, signal }
  for await (const found of ahead(list.length, look, how)) {
    throwIfAborted(signal, 'looking at the data set')
    looked.push(found)
    onProgress?.(looked.length, list.length)
  }
  const decoding = (performance.now() - began) / 1000
  const rates = ratesOf(looked)
  for (const entry of looked) judgeRate(entry, rates, options.fps)
  findDuplicates(looked)

  const good = looked.filter(({ findings }) => findings.every(({ severity }) => severity === 'warning'))
  const findings = looked.flatMap((entry) => entry.findings)
  const count = (kind: string): number => good.filter(({ item }) => item?.kind === kind).length
  const errors = findings.filter(({ severity }) => severity === 'error').length
  const used = (buckets ?? []).map((bucket, b) => ({
    ...bucket,
    clips: good.filter((entry) => entry.bucket === b).length,
  }))
  // Clips of the same bytes are encoded and kept once.
  const once = new Map(good.map((entry) => [`${entry.content} ${entry.bucket}`, entry.bucket]))
  const different = used.map((_, b) => [...once.values()].filter((bucket) => bucket === b).length)
  return {
    entries: list.length,
    usable: { videos: count('video'), images: count('image') },
    findings,
    errors,
    warnings: findings.length - errors,
    rates,
    buckets: used,
    cache: used.length > 0 ? projectCache(used, different, options.vae) : null,
    encoding:
      used.length > 0 && options.vae
        ? await projectSeconds(used, different, options.vae, decoding, signal)
        : null,
  }
}

async function lookAt(
  listed: Listed,
  options: InspectOptions & { backend: VideoBackend; signal: AbortSignal },
): Promise<Looked> {
  const { place, item } = listed
  const findings: Finding[] = []
  const error = (kind: BadReason, { message }: Error): void =>
    void findings.push({ severity: 'error', kind, place, message })
  if (!item) {
    error(listed.bad.reason, listed.bad.error)
    return { place, findings }
  }
  const { buckets, fps, short = 'reject', backend, signal } = options
  try {
    const info = await clipInfo(item, backend, signal)
    const content = await hashFile(item.path, signal)
    const placed = buckets && placeItem(item, buckets, { fps, short }, info)
    const bucket = placed && 'index' in placed ? placed.index : undefined
    const target = bucket === undefined ? undefined : (buckets?.[bucket] as Bucket)
    if (placed && 'reason' in placed) error(placed.reason, placed.error)
    else if (target && upscales(info, target)) {
      const message = `${item.name} is ${info.width}×${info.height} and would be enlarged to cover ${target.width}×${target.height}`
      findings.push({ severity: 'warning', kind: 'upscaled', place, message })
    }
    const seen = await decodeSmall(item, info, target?.frames ?? LOOK_FRAMES, options)
    // The container may promise more frames than there are.
    if (target && findings.length === 0 && seen.count < target.frames && short === 'reject') {
      error('short', tooShort(item.path, seen.count, target.frames))
    }
    const bars = findBars(seen.frames, seen)
    if (bars) findings.push(barsFinding(place, item, bars, info.width / seen.width))
    return { place, item, info, content, findings, ...(bucket === undefined ? {} : { bucket }) }
  } catch (cause) {
    if (!(cause instanceof PyraflowError) || cause.code !== 'ERR_IO') throw cause
    error('unreadable', cause)
    return { place, item, findings }
  }
}

async function decodeSmall(
  item: DatasetItem,
  info: ClipInfo,
  maxFrames: number,
  { backend, fps, signal }: { backend: VideoBackend; fps?: number | undefined; signal: AbortSignal },
): Promise<{ frames: Uint8Array; width: number; height: number; count: number }> {
  const scale = Math.min(1, LOOK / Math.max(info.width, info.height))
  const size = {
    width: Math.max(1, Math.round(info.width * scale)),
    height: Math.max(1, Math.round(info.height * scale)),
  }
  if (item.kind === 'image') return { frames: await loadImage(item.path, size), ...size, count: 1 }
  const rate = fps === undefined ? {} : { fps }
  return await backend.decode(item.path, { ...size, maxFrames, ...rate, info, signal })
}

function barsFinding(place: string, item: DatasetItem, bars: Bars, scale: number): Finding {
  const sides = Object.entries(bars).flatMap(([side, lines]) =>
    lines > 0 ? [`${Math.round(lines * scale)} ${side}`] : [],
  )
  const message = `${item.name} has black bars: about ${sides.join(', ')} (pixels)`
  return { severity: 'warning', kind: 'bars', place, message }
}

const rounded = (fps: number): number => Math.round(fps * 100) / 100

function ratesOf(looked: readonly Looked[]): { fps: number; clips: number }[] {
  const clips = new Map<number, number>()
  for (const { info } of looked) {
    if (info?.kind === 'video') clips.set(rounded(info.fps), (clips.get(rounded(info.fps)) ?? 0) + 1)
  }
  return [...clips].map(([fps, n]) => ({ fps, clips: n })).sort((a, b) => b.clips - a.clips || a.fps - b.fps)
}

function judgeRate(
  { place, item, info, findings }: Looked,
  rates: readonly { fps: number }[],
  wanted: number | undefined,
): void {
  if (info?.kind !== 'video') return
  const own = rounded(info.fps)
  const say = (what: string): void =>
    void findings.push({
      severity: 'warning',
      kind: 'fps',
      place,
      message: `${item?.name} has ${own} fps${what}`,
    })
  // A movement at half the rate looks twice as fast: without resampling, rates must agree.
  const common = rates[0]?.fps
  if (wanted === undefined && own !== common) say(`, most clips ${common}; give an fps to resample to`)
  if (wanted !== undefined && own < 0.98 * wanted) say(`: frames would be repeated to reach ${wanted}`)
}

function findDuplicates(looked: readonly Looked[]): void {
  const first = new Map<string, Looked>()
  for (const entry of looked) {
    const { content, item, place, findings } = entry
    if (content === undefined) continue
    const known = first.get(content)
    if (!known) {
      first.set(content, entry)
      continue
    }
    const caption = known.item?.text === item?.text ? 'the same caption' : 'another caption'
    const message = `${item?.name} has the bytes of ${known.item?.name} and ${caption}`
    findings.push({ severity: 'warning', kind: 'duplicate', place, message })
  }
}

function projectCache(
  buckets: readonly Bucket[],
  clips: readonly number[],
  vae: CausalVideoVAE | undefined,
): { bytes: number; how: string } {
  const shapeOf = (b: Bucket): number[] =>
    vae ? latentShape(vae, b) : [16, Math.ceil((b.frames - 1) / 8) + 1, b.height / 8, b.width / 8]
  const bytes = buckets.reduce(
    (n, bucket, b) => n + (clips[b] as number) * 4 * shapeOf(bucket).reduce((x, y) => x * y, 1),
    0,
  )
  const of = vae ? 'of this VAE' : 'of a VAE with 16 channels that divides lengths and sizes by 8'
  return {
    bytes,
    how: `means and log-variances in bf16 ${of}, clips of the same bytes once; index not counted`,
  }
}

async function projectSeconds(
  buckets: readonly Bucket[],
  clips: readonly number[],
  vae: CausalVideoVAE,
  decoding: number,
  signal: AbortSignal | undefined,
): Promise<{ seconds: number; how: string }> {
  let encoding = 0
  for (const [b, bucket] of buckets.entries()) {
    if (clips[b] === 0) continue
    const grey = new Uint8Array(3 * bucket.width * bucket.height * bucket.frames).fill(128)
    let least = Number.POSITIVE_INFINITY
    // The first run also fetches weights and memory.
    for (let run = 0; run < 2 && (run === 0 || least < 10); run++) {
      const began = performance.now()
      await encodeClip(vae, grey, bucket, { signal })
      least = Math.min(least, (performance.now() - began) / 1000)
    }
    encoding += least * (clips[b] as number)
  }
  const names = buckets.filter((_, b) => clips[b] !== 0).map(bucketName)
  return {
    seconds: Math.max(encoding, decoding),
    how: `a clip of ${names.join(', ')} was encoded on this machine and multiplied; decoding, which runs beside it, took ${decoding.toFixed(1)} s just now`,
  }
}
