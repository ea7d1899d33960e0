/**
 * Block noise as it is usually written: for every 2×2 block one draw from a normal distribution of four numbers with the
 * covariance (1+γ)I − γ·11ᵀ, by its Cholesky factor. The peer that `renoise` is measured against.
 *
 * @returns f32 [count, h, w], h and w even
 */
export function naiveBlockNoise(count: number, h: number, w: number, gamma: number): Float32Array {
  const factor = cholesky(gamma)
  const noise = new Float32Array(count * h * w)
  const z = new Float64Array(4)
  for (let f = 0; f < count; f++) {
    for (let y = 0; y < h; y += 2) {
      for (let x = 0; x < w; x += 2) {
        for (let i = 0; i < 4; i += 2) {
          const radius = Math.sqrt(-2 * Math.log(1 - Math.random()))
          const angle = 2 * Math.PI * Math.random()
          z[i] = radius * Math.cos(angle)
          z[i + 1] = radius * Math.sin(angle)
        }
        for (let i = 0; i < 4; i++) {
          let sum = 0
          for (let j = 0; j <= i; j++) sum += (factor[i * 4 + j] as number) * (z[j] as number)
          noise[(f * h + y + (i >> 1)) * w + x + (i & 1)] = sum
        }
      }
    }
  }
  return noise
}

function cholesky(gamma: number): Float64Array {
  const l = new Float64Array(16)
  for (let i = 0; i < 4; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = i === j ? 1 : -gamma
      for (let k = 0; k < j; k++) sum -= (l[i * 4 + k] as number) * (l[j * 4 + k] as number)
      // γ = 1/3 makes the last pivot zero: the four numbers of a block then sum to zero.
      l[i * 4 + j] = i === j ? Math.sqrt(Math.max(sum, 0)) : sum / (l[j * 4 + j] as number)
    }
  }
  return l
}
