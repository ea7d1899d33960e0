/** Starting points for `FineTune`, `Trainer` and `guarded`; change what you know better. */
export const presets = {
  /**
   * A model learns the subject or look of one clip: small adapters on the projections of its attentions, a few hundred
   * small steps, and a guard that ends the run when other clips, or videos of prior prompts, get worse.
   */
  oneClip: {
    lora: { rank: 8 },
    trainer: {
      steps: 200,
      batchSize: 4,
      learningRate: 2e-4,
      warmupSteps: 10,
      captionDrop: 0.1,
      optimizer: { emaDecay: 0.98, weightDecay: 1e-3 },
      checkpointEvery: 50,
      validateEvery: 20,
    },
    guard: { patience: 2, tolerance: 0.02 },
  },
} as const
