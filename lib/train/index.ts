export { type AheadOptions, ahead } from './ahead.ts'
export type { BadItem, BadReason, OnBad } from './bad-items.ts'
export type { Bucket } from './buckets.ts'
export {
  type ClipBatch,
  Dataset,
  type DatasetItem,
  type DatasetOptions,
  type OpenOptions,
  openDataset,
  type ShortClips,
} from './dataset.ts'
export {
  ADAPTER_FILE,
  FineTune,
  type FineTuneOptions,
  type FineTuneParts,
  withNormalisation,
} from './fine-tune.ts'
export { type GuardEvent, type GuardOptions, guarded } from './guard.ts'
export {
  type DatasetReport,
  type Finding,
  type FindingKind,
  type InspectOptions,
  inspectDataset,
} from './inspect.ts'
export {
  type EncodedLatents,
  type EncodeLatentsOptions,
  encodeLatents,
  type StaleLatents,
  writeLatents,
} from './latent-cache.ts'
export type { LatentBucket, LatentSource } from './latent-source.ts'
export { LatentDataset } from './latents.ts'
export type { Teacher } from './objective.ts'
export { AdamW, type AdamWOptions, type DecayGroup } from './optimizer.ts'
export { type PairDraws, type PairOptions, type TrainingPairs, trainingPairs } from './pairs.ts'
export { type PlanTrainingOptions, planTraining, type TrainingPlan } from './plan.ts'
export { presets } from './presets.ts'
export {
  bestCheckpoint,
  type Checkpoint,
  latestCheckpoint,
  type PlotOptions,
  plotRun,
  type RunSettings,
  type TrainEvent,
} from './run.ts'
export type { SampleGridOptions } from './samples.ts'
export { learningRates, type ScheduleOptions } from './schedule.ts'
export {
  CachedTextEncoder,
  type EncodedTexts,
  type EncodeTextsOptions,
  encodeTexts,
} from './text-cache.ts'
export { type ObjectiveOptions, type RehearsedBranch, Trainer, type TrainerOptions } from './trainer.ts'
export { type AdversarialOptions, VaeLoss, type VaeLossOptions } from './vae-loss.ts'
export type { ReconstructionOptions } from './vae-samples.ts'
export { VaeTrainer, type VaeTrainerOptions } from './vae-trainer.ts'
export type { VaeValidationLoss } from './vae-validation.ts'
export type { ValidationLoss } from './validation.ts'
