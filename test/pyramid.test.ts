import { describe, expect, it } from 'vitest'
import { levelSize, planHistory } from '../lib/pyramid/history.ts'
import { type Layout, makeLayout } from '../lib/pyramid/layout.ts'
import { stageLengths } from '../lib/pyramid/lengths.ts'
import { gridPositions } from '../lib/pyramid/positions.ts'
import {
  latentFrames,
  noiseFrames,
  pixelFrames,
  type UnitMode,
  unitsForFrames,
} from '../lib/pyramid/units.ts'
import { type Golden, golden, maxAbsolute } from './golden.ts'

describe('units', () => {
  it('count latent frames from seconds and from frames', () => {
    expect([5, 10, 2].map((seconds) => latentFrames({ seconds }))).toEqual([16, 31, 7])
    expect([1, 2, 9, 10, 121, 241].map((frames) => latentFrames({ frames }))).toEqual([1, 2, 2, 3, 16, 31])
    expect(latentFrames({ seconds: 5, framesPerUnit: 2 })).toBe(17)
    expect([1, 16, 31].map(pixelFrames)).toEqual([1, 121, 241])
    expect(() => latentFrames({ seconds: -1 })).toThrow(/positive/)
    expect(() => latentFrames({ frames: 1.5 })).toThrow(/whole frames/)
  })

  it('cover every frame once, in order, in both modes', () => {
    for (const mode of ['t2v', 'i2v'] as UnitMode[]) {
      for (const f of [1, 2, 3]) {
        for (const wanted of [1, 4, 7, 13]) {
          const frames = noiseFrames(wanted, { framesPerUnit: f, mode })
          const units = unitsForFrames(frames, { framesPerUnit: f, mode })
          let next = 0
          for (const unit of units) {
            expect(unit.firstFrame).toBe(next)
            next += unit.frames
            expect(unit.given || unit.noiseFrame + unit.frames <= frames).toBe(true)
          }
          expect(next).toBeGreaterThanOrEqual(wanted)
          expect(next).toBeLessThan(wanted + f)
          expect(units.filter((unit) => unit.given).length).toBe(mode === 'i2v' ? 1 : 0)
        }
      }
    }
  })

  it('take their noise one frame earlier in i2v', () => {
    expect(unitsForFrames(5, { framesPerUnit: 2 }).map((u) => u.noiseFrame)).toEqual([0, 1, 3])
    expect(unitsForFrames(6, { framesPerUnit: 2, mode: 'i2v' }).map((u) => u.noiseFrame)).toEqual([0, 0, 2])
  })

  it('refuse lengths that do not divide', () => {
    expect(() => unitsForFrames(4, { framesPerUnit: 2 })).toThrow(/1 \+ a multiple of 2/)
    expect(() => unitsForFrames(5, { framesPerUnit: 2, mode: 'i2v' })).toThrow(/a multiple of 2/)
    expect(() => unitsForFrames(0)).toThrow(expect.objectContaining({ code: 'ERR_OPTION' }))
  })
})

interface RecordedUnit {
  unit: number
  noise_frames: number
  stages: { frames: number[]; level: number; shape_thw: number[] }[][]
}

describe.each(['history_t2v_0', 'history_t2v_1', 'history_i2v_0', 'history_i2v_1'])(
  'the history of %s',
  (name) => {
    const { json } = golden(name)
    const framesPerUnit: number = json.config.frame_per_unit

    it('is the recorded plan, piece for piece', () => {
      expect(json.plan.length).toBeGreaterThan(4)
      for (const recorded of json.plan as RecordedUnit[]) {
        recorded.stages.forEach((pieces, stage) => {
          const plan = planHistory(recorded.unit, stage, 3, framesPerUnit)
          const shapes = plan.map((piece) => {
            const size = levelSize(json.config.latent_height, json.config.latent_width, piece.level, 3)
            return {
              frames: Array.from({ length: piece.frameCount }, (_, i) => piece.firstFrame + i),
              level: piece.level,
              shape_thw: [piece.frameCount, size.height, size.width],
            }
          })
          expect(shapes, `unit ${recorded.unit}, stage ${stage}`).toEqual(pieces)
        })
      }
    })

    it('belongs to units of the recorded length', () => {
      const mode: UnitMode = json.config.mode === 'generate_i2v' ? 'i2v' : 't2v'
      const frames = noiseFrames(1 + (json.config.num_units - 1) * framesPerUnit, { framesPerUnit, mode })
      const units = unitsForFrames(frames, { framesPerUnit, mode }).filter((unit) => !unit.given)
      expect(units.map((unit) => [unit.index, unit.frames])).toEqual(
        (json.plan as RecordedUnit[]).map((unit) => [unit.unit, unit.noise_frames]),
      )
    })
  },
)

describe('history', () => {
  it('covers every earlier frame exactly once for any pyramid', () => {
    for (let stages = 1; stages <= 5; stages++) {
      for (let stage = 0; stage < stages; stage++) {
        for (let unit = 0; unit < 9; unit++) {
          for (const f of [1, 2, 3]) {
            let next = 0
            let level = 0
            for (const piece of planHistory(unit, stage, stages, f)) {
              expect(piece.firstFrame).toBe(next)
              expect(piece.frameCount).toBeGreaterThan(0)
              expect(piece.level).toBeGreaterThanOrEqual(level)
              next += piece.frameCount
              level = piece.level
            }
            expect(next).toBe(unit === 0 ? 0 : 1 + (unit - 1) * f)
            if (unit > 0) expect(level).toBe(stage)
          }
        }
      }
    }
  })

  it('with a window is that of an earlier unit: the first frame and the last units', () => {
    for (let stages = 1; stages <= 4; stages++) {
      for (let stage = 0; stage < stages; stage++) {
        for (let unit = 1; unit < 9; unit++) {
          for (const f of [1, 2, 3]) {
            const seen = (of: number, window?: number): (readonly [number, number])[] =>
              planHistory(of, stage, stages, f, window).flatMap(({ firstFrame, frameCount, level }) =>
                Array.from({ length: frameCount }, (_, i) => [firstFrame + i, level] as const),
              )
            for (let window = 1; window < 10; window++) {
              const like = Math.min(unit, window + 1)
              const out = (unit - like) * f
              const wanted = seen(like).map(([frame, level]) => [frame === 0 ? 0 : frame + out, level])
              expect(seen(unit, window)).toEqual(wanted)
              expect(wanted.at(-1)?.[0]).toBe((unit - 1) * f)
            }
          }
        }
      }
    }
  })

  it('refuses a stage outside the pyramid', () => {
    expect(() => planHistory(1, 3, 3)).toThrow(/0 to 2/)
    expect(() => planHistory(1, 0, 3, 1, 0)).toThrow(/historyWindow/)
    expect(() => planHistory(-1, 0, 3)).toThrow(/unit from 0/)
  })
})

describe('stage lengths', () => {
  it('are the recorded ones for every rank and limit', () => {
    const { json } = golden('train_stage_lengths')
    expect(json.table.length).toBeGreaterThan(30)
    for (const row of json.table) {
      const calls = [1, 2, 3, 4].map((counter) => [
        ...stageLengths({
          maxFrames: row.max_temporal_length,
          framesPerUnit: row.frame_per_unit,
          syncGroup: row.video_sync_group,
          rank: row.rank,
          counter,
          batchUnits: row.max_units ?? undefined,
        }),
      ])
      expect(calls, JSON.stringify(row)).toEqual(row.first_four_calls)
    }
  })

  it('follow the number of stages', () => {
    const of = (stageCount: number): readonly number[] =>
      stageLengths({ maxFrames: 8, counter: 2, stageCount })
    expect([of(1), of(2), of(4)]).toEqual([[3], [6, 3], [6, 6, 6, 3]])
    expect(() => stageLengths({ maxFrames: 4, syncGroup: 8, counter: 1 })).toThrow(/at most 4/)
  })
})

describe('grid positions', () => {
  it('interpolate a coarser grid onto a finer one', () => {
    expect([...gridPositions(4, 8)]).toEqual([0.5, 2.5, 4.5, 6.5])
    expect([...gridPositions(3, 3)]).toEqual([0, 1, 2])
    expect(maxAbsolute(gridPositions(3, 7), [2 / 3, 3, 16 / 3])).toBeLessThan(1e-12)
    expect([...gridPositions(4, 2)]).toEqual([0, 0.25, 0.75, 1])
  })
})

interface RecordedLayout {
  index: number
  name: string
  batch_per_stage: number
  samples_thw: [number, number, number][][]
  hidden_length: number[]
  trainable_tokens: number[]
}

const variants: [string, number[]][] = [
  ['rope_ids_masks_flux', [16, 24, 24]],
  ['rope_ids_masks_mmdit', [16]],
]

describe.each(variants)('the layout of %s', (name, headAxes) => {
  const recorded = golden(name)

  it.each(recorded.json.cases as RecordedLayout[])('places the tokens of case $name', (sample) => {
    const layout = layoutOf(recorded, sample, headAxes, true)
    expect(layout.columns.map((column) => column.tokens)).toEqual(sample.hidden_length)
    expect(layout.predictionTokens.map((prediction) => prediction.count)).toEqual(sample.trainable_tokens)
    // Patchify's formula must reach every row exactly once.
    const seen = new Uint8Array(layout.latentTokens)
    layout.columns.forEach((column, c) => {
      column.clips.forEach((clip, j) => {
        expect(layout.rowOffset(c, j)).toBe(clip.rowOffset)
        for (let b = 0; b < layout.batch; b++) {
          for (let i = 0; i < clip.tokens; i++) {
            const row = clip.rowOffset + b * clip.rowStride + i
            seen[row]++
            expect(layout.latentRows[row]).toBe(b * layout.columns.length + c)
          }
        }
      })
      const prediction = layout.predictionTokens[c]
      expect(layout.latentIndexOf(c, 0, prediction.offset)).toBe(prediction.rowOffset)
      expect(prediction.offset + prediction.count).toBe(column.tokens)
    })
    expect(seen.every((count) => count === 1)).toBe(true)
  })

  it.each(recorded.json.cases as RecordedLayout[])(
    'gives the recorded ids and rotations of case $name',
    (sample) => {
      const layout = layoutOf(recorded, sample, headAxes, true)
      forEachSequence(layout, (c, b, tokens) => {
        const key = `${sample.index}.ids.stage${c}`
        const axes = recorded.tensors.entries.get(key)?.shape[2] ?? 0
        const ids = recorded.tensors
          .readFloats(key)
          .subarray(b * tokens.length * axes, (b + 1) * tokens.length * axes)
        const mine = tokens.flatMap((row) => [...layout.ids.subarray(row * 3, row * 3 + axes)])
        expect(maxAbsolute(mine, ids)).toBeLessThan(1e-6)

        const rotary = recorded.tensors.readFloats(`${sample.index}.rotary.stage${c}`)
        const half = headAxes.reduce((n, d) => n + d, 0) / 2
        const joint = jointOf(layout, c, b)
        let worst = 0
        joint.forEach((row, i) => {
          for (let p = 0; p < half; p++) {
            const matrix = ((b * joint.length + i) * half + p) * 4
            const cos = layout.jointCos[row * half + p]
            const sin = layout.jointSin[row * half + p]
            worst = Math.max(worst, maxAbsolute([cos, -sin, sin, cos], rotary.subarray(matrix, matrix + 4)))
          }
        })
        expect(worst).toBeLessThan(1e-6)
        expect(rotary.length).toBe(layout.batch * joint.length * half * 4)
      })
    },
  )

  it.each(recorded.json.cases as RecordedLayout[])('gives the recorded masks of case $name', (sample) => {
    for (const [kind, causal] of [
      ['causal', true],
      ['full', false],
    ] as const) {
      const layout = layoutOf(recorded, sample, headAxes, causal)
      forEachSequence(layout, (c, b) => {
        const mask = recorded.tensors.readArray(`${sample.index}.mask.${kind}.stage${c}`) as Uint8Array
        const joint = jointOf(layout, c, b)
        const dense = joint.flatMap((i) => joint.map((j) => sees(layout, i, j)))
        const size = joint.length ** 2
        expect(dense).toEqual([...mask.subarray(b * size, (b + 1) * size)])
      })
    }
  })

  it.each(recorded.json.cases as RecordedLayout[])('keeps the sequences of case $name apart', (sample) => {
    const layout = layoutOf(recorded, sample, headAxes, false)
    const total = layout.textTokens + layout.latentTokens
    for (let i = 0; i < total; i++) {
      for (let j = 0; j < total; j++) {
        if (layout.jointRows[i] !== layout.jointRows[j] && sees(layout, i, j)) {
          expect.fail(`token ${i} sees token ${j} of another sequence`)
        }
      }
    }
  })
})

describe('a layout', () => {
  const clip = { frames: 1, height: 4, width: 4 }
  const options = { columns: [{ clips: [clip] }], batch: 2, textLength: 3, headAxes: [4, 2, 2], causal: true }

  it('is the same for a flat and a nested text mask, and sees no padding without one', () => {
    const nested = makeLayout({
      ...options,
      textMask: [
        [1, 1, 0],
        [1, 0, 0],
      ],
    })
    const flat = makeLayout({ ...options, textMask: Uint8Array.of(1, 1, 0, 1, 0, 0) })
    expect(nested.segment).toEqual(flat.segment)
    expect([...nested.segment.subarray(0, 6)]).toEqual([0, 0, 1, 2, 3, 3])
    expect([...makeLayout(options).segment.subarray(0, 6)]).toEqual([0, 0, 0, 2, 2, 2])
  })

  it('leaves text unrotated', () => {
    const layout = makeLayout(options)
    expect(layout.jointCos.subarray(0, 6 * 4).every((value) => value === 1)).toBe(true)
    expect(layout.jointSin.subarray(0, 6 * 4).every((value) => value === 0)).toBe(true)
  })

  it.each([
    [{ columns: [] }, 'ERR_SHAPE'],
    [{ columns: [{ clips: [] }] }, 'ERR_SHAPE'],
    [{ columns: [{ clips: [{ frames: 1, height: 3, width: 4 }] }] }, 'ERR_SHAPE'],
    [{ columns: [{ clips: [{ frames: 0, height: 4, width: 4 }] }] }, 'ERR_SHAPE'],
    [{ batch: 0 }, 'ERR_SHAPE'],
    [{ textMask: [[1, 1, 1]] }, 'ERR_SHAPE'],
    [{ textMask: [1, 1, 1, 1] }, 'ERR_SHAPE'],
    [{ headAxes: [4, 4] }, 'ERR_OPTION'],
    [{ headAxes: [3, 2, 3] }, 'ERR_OPTION'],
  ])('refuses %o', (wrong, code) => {
    expect(() => makeLayout({ ...options, ...wrong })).toThrow(expect.objectContaining({ code }))
  })
})

function layoutOf(recorded: Golden, sample: RecordedLayout, headAxes: number[], causal: boolean): Layout {
  const key = `${sample.index}.text_mask`
  return makeLayout({
    columns: sample.samples_thw.map((clips) => ({
      clips: clips.map(([frames, height, width]) => ({ frames, height, width })),
    })),
    batch: sample.batch_per_stage,
    textLength: recorded.tensors.entries.get(key)?.shape[1] ?? 0,
    textMask: Array.from(recorded.tensors.readArray(key) as BigInt64Array, Number),
    headAxes,
    causal,
  })
}

function forEachSequence(layout: Layout, use: (c: number, b: number, tokens: number[]) => void): void {
  layout.columns.forEach((column, c) => {
    for (let b = 0; b < layout.batch; b++) {
      use(
        c,
        b,
        Array.from({ length: column.tokens }, (_, i) => layout.latentIndexOf(c, b, i)),
      )
    }
  })
}

/** Joint indices of one sequence in the order of the dense masks: its text, then its latent tokens. */
function jointOf(layout: Layout, c: number, b: number): number[] {
  const r = b * layout.columns.length + c
  const text = Array.from({ length: layout.textLength }, (_, i) => r * layout.textLength + i)
  const first = layout.textTokens + layout.latentIndexOf(c, b, 0)
  return [...text, ...Array.from({ length: layout.columns[c].tokens }, (_, i) => first + i)]
}

function sees(layout: Layout, i: number, j: number): number {
  return layout.segment[i] === layout.segment[j] && layout.order[i] >= layout.order[j] ? 1 : 0
}
