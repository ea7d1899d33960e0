import { engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { keep, OpenScope, scope } from './scope.ts'
import { Tensor } from './tensor.ts'

/** Work that can pause at its yields. */
export type Steps<T> = Generator<void, T>

/** Given the gradients of the outputs (null = zero), returns those of the inputs (null = none). */
export type Backward = (grads: (Tensor | null)[]) => (Tensor | null)[]

interface Node {
  inputs: readonly (Tensor | null)[]
  outputs: readonly Tensor[]
  backward: Backward
}

interface State {
  recording: boolean
  nodes: Node[]
  /** Results that lead back to leaves. */
  tracked: WeakSet<Tensor>
}

const emptyState = (recording = true): State => ({ recording, nodes: [], tracked: new WeakSet() })

let state = emptyState()

function within<T>(inner: State, fn: () => T): T {
  const outer = state
  state = inner
  try {
    return fn()
  } finally {
    state = outer
  }
}

/** A tape of its own for work that is queued in several pieces. */
export class Tape {
  readonly #state: State

  constructor(recording: boolean) {
    this.#state = emptyState(recording)
  }

  run<T>(fn: () => T): T {
    return within(this.#state, fn)
  }
}

function leadsToLeaf(tensor: Tensor | null | undefined): boolean {
  return !!tensor && (tensor.requiresGrad || state.tracked.has(tensor))
}

/** Whether backward() will want a gradient for this tensor. */
export function needsGrad(tensor: Tensor | null | undefined): boolean {
  return state.recording && leadsToLeaf(tensor)
}

/**
 * Notes how to differentiate an op. The tensors that `backward` closes over must stay alive until then: call
 * forward and backward inside one scope.
 */
export function record(
  inputs: readonly (Tensor | null)[],
  outputs: readonly Tensor[],
  backward: Backward,
): void {
  if (!inputs.some(needsGrad)) return
  for (const output of outputs) state.tracked.add(output)
  state.nodes.push({ inputs, outputs, backward })
}

/** Runs `fn` without recording. */
export function noGrad<T>(fn: () => T): T {
  const before = state.recording
  state.recording = false
  try {
    return fn()
  } finally {
    state.recording = before
  }
}

/** Runs work that may pause to its end in one go. */
export function drain<T>(steps: Steps<T>): T {
  for (;;) {
    const result = steps.next()
    if (result.done) return result.value
  }
}

/** Work that does not pause, for those who take steps. */
export function* atOnce<T>(fn: () => T): Steps<T> {
  yield
  return fn()
}

/** Forgets everything recorded. */
export function clearTape(): void {
  state = emptyState()
}

function addInto(target: Tensor, grad: Tensor): void {
  engine.run('axpby', [target, grad], [target], [1, 1, 0])
}

/**
 * The buffer that an op may accumulate a leaf's gradient into directly (then it returns null for that input);
 * undefined for results of other ops.
 */
export function gradBuffer(tensor: Tensor): Tensor | undefined {
  if (!tensor.requiresGrad) return undefined
  // Leaf gradients outlive the scope in which backward() runs.
  if (tensor.grad === null) tensor.grad = keep(Tensor.zeros(tensor.shape, 'f32'))
  return tensor.grad
}

// Pauses after every node.
function* runNodes(list: Node[], grads: Map<Tensor, Tensor>): Steps<void> {
  // How many entries of `grads` hold each gradient that was made here: the last one to be used up frees it. The
  // gradients that the caller gave stay the caller's.
  const given = new Set(grads.values())
  const uses = new Map<Tensor, number>()
  const use = (grad: Tensor, step: 1 | -1): void => {
    if (given.has(grad)) return
    const count = (uses.get(grad) ?? 0) + step
    uses.set(grad, count)
    if (count === 0) grad.dispose()
  }
  for (let i = list.length - 1; i >= 0; i--) {
    const node = list[i] as Node
    const outputGrads = node.outputs.map((output) => grads.get(output) ?? null)
    if (outputGrads.every((g) => g === null)) continue
    for (const output of node.outputs) grads.delete(output)
    const inputGrads = scope(() => node.backward(outputGrads))
    for (const grad of inputGrads) if (grad) use(grad, 1)
    node.inputs.forEach((input, k) => {
      const grad = inputGrads[k]
      if (!grad) return
      if (input?.requiresGrad) addInto(gradBuffer(input) as Tensor, grad)
      else if (input && state.tracked.has(input)) {
        const before = grads.get(input)
        if (before) {
          // A fresh sum: `before` may be shared with another branch.
          const sum = Tensor.empty(before.shape, before.dtype)
          engine.run('axpby', [before, grad], [sum], [1, 1, 0])
          grads.set(input, sum)
          use(sum, 1)
          use(before, -1)
        } else {
          grads.set(input, grad)
          return
        }
      }
      use(grad, -1)
    })
    for (const grad of outputGrads) if (grad) use(grad, -1)
    yield
  }
}

/**
 * Adds d(root)/d(leaf) to `grad` of every leaf with requiresGrad. `seed` is the gradient of `root` (default: ones;
 * then root must have one element). The tape is used up.
 * @throws ERR_SHAPE when root has more than one element and no seed is given.
 */
export function backward(root: Tensor, seed?: Tensor): void {
  scope(() => drain(backwardSteps(root, seed)))
}

/** `backward` that pauses after every op; what it makes belongs to the surrounding scope. */
export function* backwardSteps(root: Tensor, seed?: Tensor): Steps<void> {
  if (!seed && root.size !== 1) {
    throw new PyraflowError('ERR_SHAPE', {
      what: 'backward',
      expected: 'a tensor with one element, or a seed gradient',
      received: `[${root.shape}]`,
    })
  }
  const { nodes, recording } = state
  state.nodes = []
  // Nothing is recorded now, but `tracked` must still answer which inputs lead to leaves.
  state.recording = false
  try {
    yield* runNodes(nodes, new Map([[root, seed ?? Tensor.full(root.shape, 1, root.dtype)]]))
  } finally {
    state.recording = recording
    state.tracked = new WeakSet()
  }
}

/**
 * Differentiates the loss (one element) that `fn` gives, by `fn`'s inputs, on a tape and in a scope of its own: what it
 * returns and these gradients outlive it, nothing else does. A gradient is null where the loss does not depend on the
 * input. Leaves that `fn` uses collect theirs as in {@link backward}.
 */
export function* differentiate<T extends { loss: Tensor }>(
  fn: (...inputs: Tensor[]) => Steps<T>,
  inputs: readonly Tensor[],
): Steps<{ outputs: T; gradients: (Tensor | null)[] }> {
  const own = emptyState()
  const frame = new OpenScope()
  const all = inputs.map(() => true)
  const work = rerun(fn, inputs, all, ({ loss }) => new Map([[loss, Tensor.full([1], 1, loss.dtype)]]))
  try {
    for (;;) {
      // The state is the caller's again whenever this pauses.
      const { value, done } = within(own, () => frame.run(() => work.next()))
      if (done) return frame.passOn(value)
      yield
    }
  } finally {
    frame.close()
  }
}

// Runs `fn` on copies of its inputs, so that gradients end there, and then backward from `seeds`. Wants a fresh state.
function* rerun<T>(
  fn: (...inputs: Tensor[]) => Steps<T>,
  inputs: readonly Tensor[],
  wanted: readonly boolean[],
  seeds: (outputs: T) => Map<Tensor, Tensor>,
): Steps<{ outputs: T; gradients: (Tensor | null)[] }> {
  const copies = inputs.map((t) => t.view(t.shape))
  copies.forEach((copy, i) => {
    if (wanted[i]) state.tracked.add(copy)
  })
  const outputs = yield* fn(...copies)
  const found = seeds(outputs)
  state.recording = false
  yield* runNodes(state.nodes, found)
  return { outputs, gradients: copies.map((copy) => found.get(copy) ?? null) }
}

/**
 * Runs `fn(inputs)` without keeping its intermediate results; backward runs it again (activation checkpointing).
 * `fn` must be deterministic and use no tracked tensors but `inputs` and leaves.
 */
export function checkpoint(fn: (...inputs: Tensor[]) => Tensor[], inputs: Tensor[]): Tensor[] {
  const outputs = noGrad(() => scope(() => fn(...inputs)))
  if (!state.recording) return outputs
  for (const output of outputs) state.tracked.add(output)
  state.nodes.push({
    inputs,
    outputs,
    backward: (grads) => {
      const wanted = inputs.map(leadsToLeaf)
      const seeds = (ys: Tensor[]): Map<Tensor, Tensor> =>
        new Map(ys.flatMap((y, i) => (grads[i] ? [[y, grads[i]] as const] : [])))
      // biome-ignore lint/correctness/useYield: a recomputation runs in one go
      const again = function* (...copies: Tensor[]): Steps<Tensor[]> {
        return fn(...copies)
      }
      return within(emptyState(), () => scope(() => drain(rerun(again, inputs, wanted, seeds)).gradients))
    },
  })
  return outputs
}
