import { mkdir, stat, statfs } from 'node:fs/promises'
import { join } from 'node:path'
import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import { ioError, writeFileAtomically } from './atomic.ts'
import { pickWeights } from './find-weights.ts'
import {
  type FetchOptions,
  fetchBlob,
  type HubFile,
  linkBlob,
  pauseAfter,
  reasonOf,
  refusalOf,
  Transient,
} from './hub-file.ts'

export interface DownloadProgress {
  /** The file under way. */
  file: string
  /** Bytes of all wanted files that are there. */
  done: number
  /** Bytes of all wanted files. */
  total: number
}

export interface DownloadOptions {
  /** Which transformer, where a repository has several: `384p` or `diffusion_transformer_384p`. */
  variant?: string | undefined
  /** Branch, tag or commit, `main`. */
  revision?: string | undefined
  /** Default: HF_ENDPOINT, else https://huggingface.co. */
  endpoint?: string | undefined
  /** Default: HF_TOKEN, or HUGGING_FACE_HUB_TOKEN. Sent to the endpoint only. */
  token?: string | undefined
  /** Default: the cache that Python tools use as well (HF_HUB_CACHE, HF_HOME, ~/.cache/huggingface/hub). */
  cacheDir?: string | undefined
  signal?: AbortSignal | undefined
  onProgress?: ((progress: DownloadProgress) => void) | undefined
  /** Attempts without a single new byte before giving up, 5. */
  attempts?: number | undefined
  /** Milliseconds before the second attempt, 1000; the pause doubles from there. */
  pauseMs?: number | undefined
}

export interface Download {
  repo: string
  commit: string
  /** The model folder, for `Pipeline.load`. */
  path: string
  /** Folder name of the transformer, for its option `variant`. */
  variant: string
  /** Every file that belongs to the model, relative to `path`. */
  files: string[]
  /** Bytes of all of them. */
  bytes: number
  /** Bytes that came over the network now. */
  fetched: number
}

const TRANSFORMER = 'diffusion_transformer'
const VAE = 'causal_video_vae'
const ROOT_FILES = ['pyraflow.json', 'model_index.json']
// Beside weights: configurations, and what tokenizers are made of.
const SMALL = /\.(json|txt|model)$/

/**
 * Downloads a published model into the standard cache (`blobs`, `snapshots`, `refs`), only the files that generating
 * with one of its transformers needs. What an interrupted call has got, the next one continues; a finished download
 * costs two small requests.
 *
 * @param repo - `owner/name`
 * @throws ERR_OPTION for a name that is none, or a variant that the repository lacks; ERR_CHECKPOINT for one without
 *   safetensors weights; ERR_IO for what the network, the server or the disk refuses; ERR_ABORTED
 */
export async function downloadModel(repo: string, options: DownloadOptions = {}): Promise<Download> {
  const { signal, onProgress, revision = 'main', attempts = 5, pauseMs = 1000 } = options
  checkName(repo, revision)
  throwIfAborted(signal, 'download')
  const hub = await import('@huggingface/hub')
  const endpoint = (options.endpoint ?? (process.env.HF_ENDPOINT || 'https://huggingface.co')).replace(
    /\/+$/,
    '',
  )
  const send = requester(endpoint, options)
  const api = { hubUrl: endpoint, fetch: send }
  const persistence = { signal, attempts, pauseMs }
  const { commit, listed } = await asked(repo, persistence, async () => {
    const { sha } = await hub.modelInfo({ ...api, name: repo, revision, additionalFields: ['sha'] })
    if (!/^[0-9a-f]{40}$/.test(sha)) throw strange(repo, `a commit, received "${sha}"`)
    const found: HubFile[] = []
    // Of that commit, so that files of two commits can never mix.
    for await (const entry of hub.listFiles({ ...api, repo, revision: sha, recursive: true })) {
      if (entry.type !== 'file') continue
      found.push({ path: entry.path, size: entry.size, digest: entry.lfs?.oid ?? entry.oid ?? '' })
    }
    return { commit: sha, listed: found }
  })
  const { variant, files } = selectFiles(repo, listed, options.variant)
  const root = join(
    options.cacheDir ?? hub.getHFHubCachePath(),
    hub.getRepoFolderName({ type: 'model', name: repo }),
  )
  const [blobs, snapshot] = [join(root, 'blobs'), join(root, 'snapshots', commit)]
  await mkdir(blobs, { recursive: true }).catch((error: unknown) => {
    throw ioError(error, 'making', blobs)
  })

  const missing: HubFile[] = []
  for (const file of files) if (!(await exists(join(blobs, file.digest)))) missing.push(file)
  await checkRoom(blobs, missing)
  const total = files.reduce((n, { size }) => n + size, 0)
  let done = total - missing.reduce((n, { size }) => n + size, 0)
  let fetched = 0
  for (const file of files) {
    throwIfAborted(signal, 'download')
    const blob = join(blobs, file.digest)
    onProgress?.({ file: file.path, done, total })
    // Two files of the same content share a blob.
    if (missing.includes(file) && !(await exists(blob))) {
      const how: FetchOptions = {
        ...persistence,
        fetch: send,
        onBytes: (bytes, arrived) => {
          fetched += arrived
          onProgress?.({ file: file.path, done: done + bytes, total })
        },
      }
      const path = file.path.split('/').map(encodeURIComponent).join('/')
      await fetchBlob(`${endpoint}/${repo}/resolve/${commit}/${path}`, file, blob, how)
    }
    if (missing.includes(file)) done += file.size
    const pointer = join(snapshot, file.path)
    if (!(await exists(pointer))) await linkBlob(blob, pointer)
    onProgress?.({ file: file.path, done, total })
  }
  // Last: whoever follows the name finds everything there.
  if (revision !== commit) await writeFileAtomically(join(root, 'refs', revision), commit)
  return { repo, commit, path: snapshot, variant, files: files.map((f) => f.path), bytes: total, fetched }
}

function checkName(repo: string, revision: string): void {
  const part = String.raw`[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?`
  if (!new RegExp(`^${part}/${part}$`).test(repo) || /\.\.|--/.test(repo)) {
    throw new PyraflowError('ERR_OPTION', { what: 'repository', expected: 'owner/name', received: repo })
  }
  // It becomes the name of a file.
  if (!/^[\w.-]+(\/[\w.-]+)*$/.test(revision) || revision.includes('..')) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'revision',
      expected: 'a branch, tag or commit',
      received: revision,
    })
  }
}

/** Sends requests with the token, which no other host is shown, and the signal. */
function requester(endpoint: string, { token, signal }: DownloadOptions): typeof fetch {
  const secret = token ?? (process.env.HF_TOKEN || process.env.HUGGING_FACE_HUB_TOKEN)
  let home: string
  try {
    home = new URL(endpoint).origin
  } catch (cause) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'endpoint',
      expected: 'a URL such as https://huggingface.co',
      received: endpoint,
      cause,
    })
  }
  return (input, init = {}) => {
    const headers = new Headers(init.headers)
    const url = typeof input === 'string' ? input : input instanceof URL ? input.href : input.url
    // A redirect to another host drops the header by itself.
    if (secret && new URL(url).origin === home) headers.set('authorization', `Bearer ${secret}`)
    // Lengths and ranges must be those of the file.
    headers.set('accept-encoding', 'identity')
    return fetch(input, { ...init, headers, ...(signal ? { signal } : {}) })
  }
}

/** What the library throws, typed; what may pass is tried again. */
async function asked<T>(
  repo: string,
  persistence: Pick<FetchOptions, 'attempts' | 'pauseMs' | 'signal'>,
  ask: () => Promise<T>,
): Promise<T> {
  for (let failures = 1; ; failures++) {
    try {
      return await ask()
    } catch (error) {
      throwIfAborted(persistence.signal, 'download')
      if (error instanceof PyraflowError) throw error
      const { statusCode } = error as { statusCode?: number }
      const refused =
        statusCode === undefined
          ? new Transient(`no usable answer (${reasonOf(error)})`, error)
          : refusalOf(statusCode, repo)
      if (!(refused instanceof Transient)) throw refused
      await pauseAfter(refused, failures, repo, persistence)
    }
  }
}

function strange(repo: string, expected: string): PyraflowError {
  return new PyraflowError('ERR_IO', { what: `listing of ${repo}`, expected, remedy: 'Check the endpoint.' })
}

/** The files of one transformer and of all that it works with. */
function selectFiles(
  repo: string,
  listed: readonly HubFile[],
  wanted: string | undefined,
): { variant: string; files: HubFile[] } {
  const folders = new Map<string, HubFile[]>()
  for (const file of listed) {
    // Deeper files belong to nothing that is known here, and odd names could lead out of the folder.
    const [, folder, name] = /^(?:([\w-]+)\/)?(\w[\w.-]*)$/.exec(file.path) ?? []
    if (name === undefined) continue
    folders.set(folder ?? '', [...(folders.get(folder ?? '') ?? []), file])
  }
  const variants = [...folders.keys()].filter((name) => name.startsWith(TRANSFORMER)).sort()
  const variant = pickVariant(repo, variants, wanted)
  const files = (folders.get('') ?? []).filter(({ path }) => ROOT_FILES.includes(path))
  for (const [folder, inside] of folders) {
    const network = folder === variant || folder === VAE || /^text_encoder(_\d)?$/.test(folder)
    if (!network && !/^tokenizer(_\d)?$/.test(folder)) continue
    const names = inside.map(({ path }) => path.slice(folder.length + 1))
    const weighty = network && names.some((name) => /\.(safetensors|bin|pt|pth|ckpt)$/.test(name))
    const weights = weighty ? weightFiles(names, `${repo}, folder ${folder}`) : []
    for (const [i, file] of inside.entries()) {
      const name = names[i] as string
      const index = name.endsWith('.index.json')
      if (weights.includes(name) || (SMALL.test(name) && !index)) files.push(file)
    }
  }
  const odd = files.find(({ digest }) => !/^([0-9a-f]{40}|[0-9a-f]{64})$/.test(digest))
  if (odd) throw strange(repo, `a checksum of ${odd.path}, received "${odd.digest}"`)
  return { variant, files: files.sort((a, b) => a.size - b.size || (a.path < b.path ? -1 : 1)) }
}

function pickVariant(repo: string, variants: readonly string[], wanted: string | undefined): string {
  const found = variants.filter(
    (name) => wanted === undefined || name === wanted || name === `${TRANSFORMER}_${wanted}`,
  )
  const [only] = found
  if (only !== undefined && found.length === 1) return only
  const received = variants.join(', ') || 'none'
  if (variants.length === 0) {
    throw new PyraflowError('ERR_CHECKPOINT', {
      what: `repository ${repo}`,
      expected: `a folder ${TRANSFORMER}…`,
      received,
      remedy: 'Only models of the Pyramid Flow family are understood.',
    })
  }
  const what = `variant of ${repo}`
  if (wanted === undefined) {
    throw new PyraflowError('ERR_OPTION', { what, expected: `one of ${received}`, received: 'none chosen' })
  }
  throw new PyraflowError('ERR_OPTION', { what, expected: `one of ${received}`, received: wanted })
}

/** The weights that loading the folder would read: one file, or an index and its shards. */
function weightFiles(names: readonly string[], place: string): string[] {
  const { path, sharded } = pickWeights(names, place)
  if (!sharded) return [path]
  const stem = path.slice(0, -'.safetensors.index.json'.length)
  const shards = names.filter((name) => name.startsWith(`${stem}-`) && /-\d+-of-\d+\.safetensors$/.test(name))
  return [path, ...shards]
}

/** @throws ERR_IO when the disk has not the room for what is missing. */
async function checkRoom(blobs: string, missing: readonly HubFile[]): Promise<void> {
  let needed = 0
  for (const { digest, size } of new Map(missing.map((file) => [file.digest, file])).values()) {
    const have = (await stat(join(blobs, `${digest}.incomplete`)).catch(() => undefined))?.size ?? 0
    needed += Math.max(0, size - have)
  }
  const { bavail, bsize } = await statfs(blobs)
  if (needed <= bavail * bsize) return
  const gigabytes = (bytes: number): string => `${(bytes / 1e9).toFixed(bytes < 1e8 ? 3 : 1)} GB`
  throw new PyraflowError('ERR_IO', {
    what: `room for ${blobs}`,
    expected: gigabytes(needed),
    received: gigabytes(bavail * bsize),
    remedy: 'Free some disk space, or choose another cache folder (HF_HUB_CACHE, --cache-dir).',
  })
}

async function exists(path: string): Promise<boolean> {
  return (await stat(path).catch(() => undefined)) !== undefined
}
