#!/usr/bin/env node
import { Command, CommanderError } from 'commander'
import { EXIT, explain } from './console.ts'
import { addDoctor } from './doctor.ts'
import { addDownload } from './download.ts'
import { addEncode } from './encode.ts'
import { addGenerate } from './generate.ts'
import { addInfo } from './info.ts'
import { addPlan } from './plan.ts'
import { addTrain } from './train.ts'
import { addVerify } from './verify.ts'
import { packageVersion } from './version.ts'

function makeProgram(): Command {
  const program = new Command('pyraflow')
    .description('Pyramidal flow matching video generation and training')
    .version(packageVersion(), '-V, --version')
    .showSuggestionAfterError()
    .showHelpAfterError('(add --help for the options)')
    .exitOverride()
    .addHelpText(
      'after',
      '\nEvery option can also come from a PYRAFLOW_* variable. Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.',
    )
  // Settings for subcommands are copied when they are made, so they come after the lines above.
  const all = [addGenerate, addPlan, addTrain, addEncode, addDoctor, addDownload, addVerify, addInfo]
  for (const add of all) add(program)
  return program
}

/** Runs the program; resolves to its exit code. */
export async function main(argv: readonly string[]): Promise<number> {
  try {
    await makeProgram().parseAsync([...argv])
    return Number(process.exitCode ?? EXIT.done)
  } catch (error) {
    // Commander has already said what was wrong.
    if (error instanceof CommanderError) return error.exitCode === 0 ? EXIT.done : EXIT.usage
    return explain(error)
  }
}

// A reader that closes the pipe early (`| head`) is no error.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(EXIT.done)
  throw error
})

void main(process.argv).then((code) => {
  process.exitCode = code
})
