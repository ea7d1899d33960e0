import { availableParallelism } from 'node:os'
import { defineConfig } from 'vitest/config'

// Forks, because a native crash must end one file and not the run. One at a time, because several tests measure
// delays and a second engine on the same cores would be measured with them.
export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    pool: 'forks',
    maxWorkers: 1,
    testTimeout: 60_000,
    hookTimeout: 60_000,
    env: {
      OMP_NUM_THREADS: process.env.OMP_NUM_THREADS ?? String(Math.min(2, availableParallelism())),
    },
  },
})
