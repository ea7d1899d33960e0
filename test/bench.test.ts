import { spawnSync } from 'node:child_process'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

const root = dirname(dirname(fileURLToPath(import.meta.url)))

function bench(...args: string[]) {
  const program = ['--import', join(root, 'test/ts-hooks.mjs'), join(root, 'bench/main.ts')]
  return spawnSync(process.execPath, [...program, ...args], { cwd: root, encoding: 'utf8', timeout: 50_000 })
}

test('bench writes its machine and its figures as JSON and its tables on stderr', () => {
  const { status, stdout, stderr } = bench('--filter', 'dispatch', '--quick', '--json', '-')
  expect(status, stderr).toBe(0)
  expect(stderr).toContain('dispatch')

  const result = JSON.parse(stdout)
  expect(result.quick).toBe(true)
  expect(new Date(result.date).getTime()).toBeGreaterThan(0)
  expect(result.machine).toMatchObject({
    cpu: expect.any(String),
    cores: expect.any(Number),
    memoryBytes: expect.any(Number),
    backend: expect.stringMatching(/^(cpu_|ref)/),
    threads: expect.any(Number),
    node: process.version,
    platform: `${process.platform}-${process.arch}`,
  })
  expect(result.rows.length).toBeGreaterThan(0)
  for (const row of result.rows) {
    expect(row).toMatchObject({ group: 'dispatch', name: expect.any(String), unit: expect.any(String) })
    expect(row.value).toBeGreaterThan(0)
  }
  // The bound travels with the figure, so that a reader of the file needs no table of bounds.
  expect(result.rows.filter((row: { required?: object }) => row.required)).toMatchObject([
    { name: expect.stringContaining('queue one op'), unit: 'µs', required: { of: 'value', atMost: 3 } },
  ])
})

test('bench ends with status 2 and its usage for a group or an option it does not have', () => {
  for (const args of [['--filter', 'nonsense'], ['--nonsense']]) {
    const { status, stdout, stderr } = bench(...args)
    expect(status).toBe(2)
    expect(stdout).toBe('')
    expect(stderr).toContain('npm run bench')
  }
})

test('bench saves only the figures of a full run', () => {
  expect(bench('--save', '--quick').status).toBe(2)
  expect(bench('--save', '--filter', 'dispatch').status).toBe(2)
})
