import { readFile } from 'node:fs/promises'
import { register } from 'node:module'
import { fileURLToPath } from 'node:url'
import { isMainThread } from 'node:worker_threads'

// Lets a plain `node --import test/ts-hooks.mjs` child run the sources: tests that need a process of their own
// (another thread count, a memory limit) must not depend on a build. Hooks run on a thread that loads this file too.
if (isMainThread) register(import.meta.url)

let typescript

export async function load(url, context, next) {
  if (!url.startsWith('file:') || !url.endsWith('.ts')) return next(url, context)
  typescript ??= (await import('typescript')).default
  const options = { module: typescript.ModuleKind.ESNext, target: typescript.ScriptTarget.ES2022 }
  const source = typescript.transpileModule(await readFile(fileURLToPath(url), 'utf8'), {
    compilerOptions: { ...options, verbatimModuleSyntax: true },
  }).outputText
  return { format: 'module', source, shortCircuit: true }
}
