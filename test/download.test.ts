import { spawn } from 'node:child_process'
import {
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { type DownloadOptions, downloadModel, Pipeline } from '../lib/index.ts'
import { FakeHub, sendFile } from './fixtures/hub.ts'
import { mountSmallDisk, remount } from './fixtures/small-disk.ts'
import { numbers, writePipeline } from './fixtures/tiny.ts'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const folder = mkdtempSync(join(tmpdir(), 'download-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const WEIGHTS = 'diffusion_transformer_384p/diffusion_pytorch_model.safetensors'
const BIG = Buffer.from(numbers(60_000, 3).buffer)

/** A repository as published ones are laid out; only the large transformer has bytes worth interrupting. */
const published = (): Record<string, Buffer | string> => ({
  'README.md': '# A model',
  '.gitattributes': '*.safetensors filter=lfs',
  'model_index.json': '{}',
  'diffusion_transformer_384p/config.json': '{"_class_name": "PyramidFluxTransformer"}',
  [WEIGHTS]: BIG,
  'diffusion_transformer_768p/config.json': '{"n": 0}',
  'diffusion_transformer_768p/diffusion_pytorch_model.safetensors': Buffer.alloc(3000, 7),
  'causal_video_vae/config.json': '{"n": 1}',
  'causal_video_vae/diffusion_pytorch_model.safetensors': Buffer.alloc(2000, 1),
  'causal_video_vae/diffusion_pytorch_model.bin': Buffer.alloc(2000, 2),
  'text_encoder/config.json': '{"n": 2}',
  'text_encoder/model.safetensors': Buffer.alloc(1500, 3),
  'text_encoder/flax_model.msgpack': 'x',
  'text_encoder_2/config.json': '{"n": 3}',
  'text_encoder_2/model-00001-of-00002.safetensors': Buffer.alloc(1500, 4),
  'text_encoder_2/model-00002-of-00002.safetensors': Buffer.alloc(1500, 5),
  'text_encoder_2/model.safetensors.index.json': '{"weight_map": {}}',
  'text_encoder_2/model.fp16.safetensors': Buffer.alloc(1500, 6),
  'tokenizer/merges.txt': '#version: 0.2',
  'tokenizer/vocab.json': '{"n": 4}',
  'tokenizer_2/spiece.model': 'pieces',
  'tokenizer_2/tokenizer.json': '{"n": 5}',
  'assets/video.mp4': 'film',
  '../../evil.json': 'evil',
})
const WANTED = [
  'causal_video_vae/config.json',
  'causal_video_vae/diffusion_pytorch_model.safetensors',
  'diffusion_transformer_384p/config.json',
  WEIGHTS,
  'model_index.json',
  'text_encoder/config.json',
  'text_encoder/model.safetensors',
  'text_encoder_2/config.json',
  'text_encoder_2/model-00001-of-00002.safetensors',
  'text_encoder_2/model-00002-of-00002.safetensors',
  'text_encoder_2/model.safetensors.index.json',
  'tokenizer/merges.txt',
  'tokenizer/vocab.json',
  'tokenizer_2/spiece.model',
  'tokenizer_2/tokenizer.json',
]

const hubs: { stop(): Promise<void> }[] = []
afterEach(async () => {
  for (const hub of hubs.splice(0)) await hub.stop()
})

async function start(files: Record<string, Buffer | string> = published()): Promise<FakeHub> {
  const hub = await new FakeHub(files).start()
  hubs.push(hub)
  return hub
}

let caches = 0
const newCache = (): string => join(folder, `cache${++caches}`)

function get(hub: FakeHub, cacheDir: string, options: DownloadOptions = {}) {
  const { repo, url: endpoint } = hub
  return downloadModel(repo, { endpoint, cacheDir, variant: '384p', attempts: 3, pauseMs: 1, ...options })
}

const blobsOf = (cache: string): string => join(cache, 'models--someone--some-model', 'blobs')
const refOf = (cache: string): string => join(cache, 'models--someone--some-model', 'refs', 'main')

describe('a download', () => {
  test('takes the files of one transformer and all it needs, in the layout of the shared cache', async () => {
    const hub = await start()
    const cache = newCache()
    const progress: number[] = []
    const done = await get(hub, cache, { onProgress: (p) => progress.push(p.done / p.total) })
    const path = join(cache, 'models--someone--some-model', 'snapshots', hub.commit)
    expect(done).toMatchObject({
      repo: hub.repo,
      commit: hub.commit,
      path,
      variant: 'diffusion_transformer_384p',
    })
    expect(done.files.toSorted()).toEqual(WANTED.toSorted())
    expect(done.fetched).toBe(done.bytes)
    expect(progress.at(-1)).toBe(1)
    expect(progress).toEqual(progress.toSorted((a, b) => a - b))
    for (const name of WANTED) {
      expect(readFileSync(join(path, name)), name).toEqual(hub.files.get(name))
      expect(lstatSync(join(path, name)).isSymbolicLink(), name).toBe(true)
      expect(readlinkSync(join(path, name))).toBe(
        `${name.includes('/') ? '../' : ''}../../blobs/${hub.digest(name)}`,
      )
      expect(realpathSync(join(path, name))).toBe(join(realpathSync(blobsOf(cache)), hub.digest(name)))
    }
    expect(readFileSync(refOf(cache), 'utf8')).toBe(hub.commit)
    expect(
      readdirSync(path, { recursive: true, withFileTypes: true }).filter((e) => !e.isDirectory()),
    ).toHaveLength(WANTED.length)
    expect(existsSync(join(cache, '..', 'evil.json'))).toBe(false)
  })

  test('that is complete asks for the listing only, and of a new commit only for what changed', async () => {
    const hub = await start()
    const cache = newCache()
    await get(hub, cache)
    const before = hub.fetched.length
    expect(await get(hub, cache)).toMatchObject({ fetched: 0 })
    expect(hub.fetched).toHaveLength(before)
    const changed = await start({ ...published(), 'model_index.json': '{"changed": true}' })
    Object.assign(changed, { commit: 'decade'.padEnd(40, '0') })
    expect((await get(changed, cache)).fetched).toBe(17)
    expect(changed.fetched.map(({ path }) => path.split('/').at(-1))).toEqual(['model_index.json'])
    expect(readFileSync(refOf(cache), 'utf8')).toBe(changed.commit)
    expect(existsSync(join(cache, 'models--someone--some-model', 'snapshots', hub.commit, WEIGHTS))).toBe(
      true,
    )
  })

  test('gives a folder that a pipeline loads', async () => {
    const dir = join(folder, 'pipeline')
    await writePipeline(dir)
    const files: Record<string, Buffer> = {}
    for (const entry of readdirSync(dir, { recursive: true, withFileTypes: true })) {
      if (!entry.isFile()) continue
      const path = join(entry.parentPath, entry.name)
      files[path.slice(dir.length + 1)] = readFileSync(path)
    }
    const { path, variant } = await get(await start(files), newCache(), { variant: undefined })
    const pipeline = await Pipeline.load(path, { variant })
    expect(pipeline.config.sizes).toEqual([[64, 64]])
    pipeline.dispose()
  })

  test('follows HF_ENDPOINT and shows the token to the endpoint, but not to the host it redirects to', async () => {
    const hub = await start()
    let tokenElsewhere: string | undefined = 'not asked'
    const elsewhere = createServer((request, response) => {
      tokenElsewhere = request.headers.authorization
      sendFile(request, response, BIG)
    })
    await new Promise<void>((resolve) => elsewhere.listen(0, 'localhost', resolve))
    hub.answer = (_, response, bytes) => {
      if (bytes !== hub.files.get(WEIGHTS)) return false
      response
        .writeHead(302, { location: `http://localhost:${(elsewhere.address() as AddressInfo).port}/x` })
        .end()
      return true
    }
    process.env.HF_ENDPOINT = hub.url
    process.env.HF_TOKEN = 'secret'
    try {
      await downloadModel(hub.repo, { cacheDir: newCache(), variant: 'diffusion_transformer_384p' })
    } finally {
      delete process.env.HF_ENDPOINT
      delete process.env.HF_TOKEN
      elsewhere.close()
    }
    expect(new Set(hub.seen.map(({ token }) => token))).toEqual(new Set(['Bearer secret']))
    expect(tokenElsewhere).toBeUndefined()
  })
})

describe('an interrupted download', () => {
  test('continues at the byte where the connection broke, by itself', async () => {
    const hub = await start()
    const cuts = [50_000, 120_000]
    hub.answer = (request, response, bytes) => {
      const cut = bytes.length === BIG.length ? cuts.shift() : undefined
      if (cut === undefined) return false
      const from = Number(/\d+/.exec(request.headers.range ?? '0')?.[0])
      const headers = {
        'content-length': bytes.length - from,
        'content-range': `bytes ${from}-${bytes.length - 1}/${bytes.length}`,
      }
      response.writeHead(from ? 206 : 200, headers)
      response.write(bytes.subarray(from, cut), () => setTimeout(() => response.destroy(), 20))
      return true
    }
    const { path, fetched, bytes } = await get(hub, newCache())
    expect(readFileSync(join(path, WEIGHTS))).toEqual(BIG)
    const ranges = hub.fetched.filter((seen) => seen.path.includes('384p/diff')).map((seen) => seen.range)
    expect(ranges).toEqual([undefined, 'bytes=50000-', 'bytes=120000-'])
    expect(fetched).toBe(bytes)
  })

  test('that was aborted leaves nothing under a final name, and the next call continues it', async () => {
    const hub = await start()
    const cache = newCache()
    hub.answer = (_, response, bytes) => {
      if (bytes.length !== BIG.length) return false
      response.writeHead(200, { 'content-length': bytes.length }).write(bytes.subarray(0, 100_000))
      return true
    }
    const stop = new AbortController()
    const aborted = get(hub, cache, {
      signal: stop.signal,
      onProgress: ({ file, done, total }) =>
        file === WEIGHTS && total - done <= BIG.length - 100_000 && stop.abort(),
    })
    await expect(aborted).rejects.toMatchObject({ name: 'PyraflowError', code: 'ERR_ABORTED' })
    const digest = hub.digest(WEIGHTS)
    expect(existsSync(join(blobsOf(cache), digest))).toBe(false)
    expect(existsSync(refOf(cache))).toBe(false)
    hub.answer = () => false
    const { path, fetched } = await get(hub, cache)
    expect(fetched).toBe(BIG.length - 100_000)
    expect(hub.fetched.at(-1)?.range).toBe('bytes=100000-')
    expect(readFileSync(join(path, WEIGHTS))).toEqual(BIG)
    expect(readdirSync(blobsOf(cache)).filter((name) => /incomplete|tmp/.test(name))).toEqual([])
  })

  test('starts again where the server knows no ranges, or where the old bytes prove wrong', async () => {
    for (const ranges of [false, true]) {
      const hub = await start()
      const cache = newCache()
      mkdirSync(blobsOf(cache), { recursive: true })
      writeFileSync(join(blobsOf(cache), `${hub.digest(WEIGHTS)}.incomplete`), Buffer.alloc(70_000, 9))
      hub.answer = (_, response, bytes) => {
        if (ranges) return false
        response.writeHead(200).end(bytes)
        return true
      }
      const { path } = await get(hub, cache)
      expect(readFileSync(join(path, WEIGHTS))).toEqual(BIG)
      const asked = hub.fetched.filter((seen) => seen.path.includes('384p/diff')).map((seen) => seen.range)
      expect(asked).toEqual(ranges ? ['bytes=70000-', undefined] : ['bytes=70000-'])
    }
  })

  test('is tried again after statuses that pass, of the listing as well', async () => {
    const hub = await start()
    const failures = [503, 429]
    hub.answer = (_, response) => {
      const status = failures.pop()
      if (status === undefined) return false
      response.writeHead(status, { 'retry-after': '0' }).end()
      return true
    }
    hub.status = 502
    setTimeout(() => {
      hub.status = 200
    }, 30)
    await get(hub, newCache(), { pauseMs: 40 })
    expect(failures).toEqual([])
  })
})

describe('a download fails', () => {
  const failing = async (hub: FakeHub, cache: string, options: DownloadOptions = {}) => {
    const error = await get(hub, cache, options).then(
      () => undefined,
      (e: unknown) => e as { code: string; message: string; name: string },
    )
    expect(error?.name).toBe('PyraflowError')
    expect(existsSync(refOf(cache))).toBe(false)
    return error as { code: string; message: string }
  }

  test.each([
    [401, /HF_TOKEN/],
    [403, /terms/],
    [404, /name of the repository/],
    [500, /3 times in a row/],
  ])('with the repository answering %i, and says what to do', async (status, text) => {
    const hub = await start()
    hub.status = status
    const error = await failing(hub, newCache())
    expect(error).toMatchObject({ code: 'ERR_IO', message: expect.stringMatching(text) })
    expect(error.message).toContain(String(status))
  })

  test('where nobody listens', async () => {
    const hub = await start()
    const { url } = hub
    await hubs.pop()?.stop()
    const gone = downloadModel(hub.repo, { endpoint: url, cacheDir: newCache(), attempts: 2, pauseMs: 1 })
    await expect(gone).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringContaining('ECONNREFUSED'),
    })
    await expect(downloadModel(hub.repo, { endpoint: 'nonsense' })).rejects.toMatchObject({
      code: 'ERR_OPTION',
    })
  })

  test('on a body that always ends early, keeping what came for later', async () => {
    const hub = await start()
    const cache = newCache()
    hub.answer = (_, response, bytes) => {
      if (bytes.length !== BIG.length) return false
      // No length: the early end looks like a proper one.
      response.writeHead(200).end(bytes.subarray(0, 1000))
      return true
    }
    const error = await failing(hub, cache)
    expect(error).toMatchObject({
      code: 'ERR_IO',
      message: expect.stringMatching(/ended at byte 1000.*continues/),
    })
    const digest = hub.digest(WEIGHTS)
    expect(readdirSync(blobsOf(cache)).filter((name) => name.startsWith(digest))).toEqual([
      `${digest}.incomplete`,
    ])
    hub.answer = () => false
    expect((await get(hub, cache)).fetched).toBe(BIG.length - 1000)
  })

  test.each([
    ['large', WEIGHTS],
    ['small', 'model_index.json'],
  ])('on other bytes than the checksum of a %s file says, and keeps none of them', async (_size, name) => {
    const hub = await start()
    const cache = newCache()
    hub.answer = (_, response, bytes) => {
      if (bytes !== hub.files.get(name)) return false
      const other = Buffer.from(bytes)
      other[0] = (other[0] as number) ^ 1
      response.writeHead(200, { 'content-length': other.length }).end(other)
      return true
    }
    const error = await failing(hub, cache)
    expect(error).toMatchObject({ code: 'ERR_IO', message: expect.stringContaining(`checksum of ${name}`) })
    expect(readdirSync(blobsOf(cache)).filter((blob) => blob.startsWith(hub.digest(name)))).toEqual([])
    hub.answer = () => false
    await get(hub, cache)
  })

  test('on a repository of pickles, and says how to convert them', async () => {
    const files = published()
    delete files['causal_video_vae/diffusion_pytorch_model.safetensors']
    const hub = await start(files)
    const error = await failing(hub, newCache())
    expect(error).toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringMatching(/causal_video_vae.*pickle.*safetensors/s),
    })
    expect(hub.fetched).toEqual([])
  })

  test('on names that are none, and on variants that are not there', async () => {
    const hub = await start()
    for (const [options, text] of [
      [{ variant: undefined }, /diffusion_transformer_384p, diffusion_transformer_768p/],
      [{ variant: '1080p' }, /received 1080p/],
      [{ revision: '../main' }, /revision/],
    ] as const) {
      const error = await failing(hub, newCache(), options)
      expect(error).toMatchObject({ code: 'ERR_OPTION', message: expect.stringMatching(text) })
    }
    for (const repo of ['x', 'a/b/c', '../x', 'a/..', 'datasets/a/b', '']) {
      await expect(downloadModel(repo, { endpoint: hub.url }), repo).rejects.toMatchObject({
        code: 'ERR_OPTION',
      })
    }
    const empty = await start({ 'README.md': 'nothing' })
    expect(await failing(empty, newCache())).toMatchObject({ code: 'ERR_CHECKPOINT' })
  })

  test('on a disk without room, before it begins or when it fills up, and works once there is', async (context) => {
    const disk = mountSmallDisk(join(folder, 'disk'), '200k')
    if (!disk) return context.skip('a small file system could not be mounted')
    const hub = await start()
    const cache = join(disk, 'cache')
    const small = await failing(hub, cache)
    expect(small).toMatchObject({
      code: 'ERR_IO',
      message: expect.stringMatching(/room.*0\.2\d+ GB|room.*0\.000 GB/),
    })
    expect(hub.fetched).toEqual([])
    remount(disk, 'size=600k')
    let fill = true
    const onProgress = ({ file }: { file: string }): void => {
      if (fill && file === WEIGHTS) writeFileSync(join(disk, 'filler'), Buffer.alloc(420_000))
      if (file === WEIGHTS) fill = false
    }
    const full = await failing(hub, cache, { onProgress })
    expect(full).toMatchObject({
      code: 'ERR_IO',
      message: expect.stringMatching(/ENOSPC.*free some disk space/),
    })
    expect(existsSync(join(blobsOf(cache), hub.digest(WEIGHTS)))).toBe(false)
    rmSync(join(disk, 'filler'))
    const { path } = await get(hub, cache)
    expect(readFileSync(join(path, WEIGHTS))).toEqual(BIG)
  })
})

describe('pyraflow download', () => {
  let main: string
  beforeAll(() => {
    main = join(root, 'dist/lib/cli/main.js')
  })
  function run(args: string[], onStderr: (text: string, kill: () => void) => void = () => undefined) {
    const child = spawn(process.execPath, [main, 'download', ...args], {
      env: { ...process.env, HF_TOKEN: '' },
    })
    let [stdout, stderr] = ['', '']
    child.stdout.on('data', (text) => {
      stdout += text
    })
    child.stderr.on('data', (text) => {
      stderr += text
      onStderr(String(text), () => child.kill('SIGINT'))
    })
    return new Promise<{ code: number | null; stdout: string; stderr: string }>((resolve) => {
      child.on('close', (code) => resolve({ code, stdout, stderr }))
    })
  }

  test('prints the folder or one JSON object on stdout, progress on stderr', async () => {
    const hub = await start()
    const where = ['--endpoint', hub.url, '--cache-dir', newCache(), '--variant', '384p']
    const plain = await run([hub.repo, ...where, '--progress', 'plain'])
    expect(plain.stderr).toMatch(/MB 1\/1/)
    expect(plain).toMatchObject({ code: 0, stdout: expect.stringMatching(/snapshots\/c0ffee0+\n$/) })
    const { code, stdout } = await run([hub.repo, ...where, '--json'])
    expect(code).toBe(0)
    expect(JSON.parse(stdout)).toMatchObject({
      repo: hub.repo,
      fetched: 0,
      variant: 'diffusion_transformer_384p',
    })
  })

  test('ends with 130 on Ctrl-C, 2 on a wrong call and 1 on a refusal', async () => {
    const hub = await start()
    const where = ['--endpoint', hub.url, '--cache-dir', newCache(), '--progress', 'json']
    expect(await run([hub.repo, ...where])).toMatchObject({
      code: 2,
      stderr: expect.stringContaining('768p'),
    })
    expect(await run(['x', ...where])).toMatchObject({
      code: 2,
      stderr: expect.stringContaining('owner/name'),
    })
    expect(await run(['some/other', ...where])).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('404'),
    })
    hub.answer = (_, response, bytes) => {
      if (bytes.length !== BIG.length) return false
      response.writeHead(200, { 'content-length': bytes.length }).write(bytes.subarray(0, 100_000))
      return true
    }
    let killed = false
    const stopped = await run([hub.repo, ...where, '--variant', '384p'], (text, kill) => {
      if (killed || !text.includes(WEIGHTS)) return
      killed = true
      setTimeout(kill, 50)
    })
    expect(stopped).toMatchObject({ code: 130, stdout: '' })
  })

  test('is the only command that loads the library for it', () => {
    const sources = readdirSync(join(root, 'lib'), { recursive: true })
      .map(String)
      .filter((name) => name.endsWith('.ts'))
    const importing = sources.filter((name) =>
      readFileSync(join(root, 'lib', name), 'utf8').includes("'@huggingface/hub'"),
    )
    expect(importing).toEqual([join('io', 'download.ts')])
    const lines = readFileSync(join(root, 'lib/io/download.ts'), 'utf8').split('\n')
    expect(lines.filter((line) => line.includes("'@huggingface/hub'"))).toEqual([
      "  const hub = await import('@huggingface/hub')",
    ])
  })
})
