/** One comparison with a recorded number or tensor; it passes when error ≤ tolerance. */
export interface Check {
  name: string
  error: number
  tolerance: number
}

/** What the cases are run in. */
export interface CaseContext {
  dtype: 'f32' | 'bf16'
}

/** Runs one recorded case. `json` is its case.json. */
// biome-ignore lint/suspicious/noExplicitAny: every case has its own JSON layout
export type CaseRunner = (dir: string, json: any, ctx: CaseContext) => Promise<Check[]>
