/** What a training run tells while it goes on; `step` counts finished steps, so the first one is 1. */
export type TrainEvent =
  | { type: 'resume'; step: number }
  | {
      type: 'step'
      step: number
      /** Mean over the micro-steps, like the metrics. */
      loss: number
      /** Of the averaged gradients, before clipping. */
      gradNorm: number
      learningRate: number
      seconds: number
      [metric: string]: number | string
    }
  | {
      /** The weights were left as they were. */
      type: 'skipped'
      step: number
      loss: number
      /** The loss, or the first parameter whose gradient is not finite; absent when the loss was above `maxLoss`. */
      culprit?: string
    }
  | {
      /** The weights are those of checkpoint `to` again; training goes on with the data after `step`. */
      type: 'rollback'
      step: number
      to: number
      culprit: string
    }
  | { type: 'validation'; step: number; loss: number; [metric: string]: number | string }
  | { type: 'samples'; step: number; files: string[] }
  | { type: 'checkpoint'; step: number; path: string }
  | {
      /** A validation loss below all before it; `path` is the checkpoint that is kept for it. */
      type: 'best'
      step: number
      loss: number
      path: string
    }

/** The events that metrics.jsonl holds: what happened in a step, in the order of the steps. */
export type NotedEvent = Extract<
  TrainEvent,
  { type: 'step' | 'skipped' | 'rollback' | 'validation' | 'samples' }
>
