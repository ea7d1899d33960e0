const table: Float32Array = new Float32Array(65536)
let filled = false

/** Widens IEEE half-precision bits to float32; exact, including subnormals, infinities and NaN. */
export function float16ToFloat32(bits: Uint16Array): Float32Array<ArrayBuffer> {
  if (!filled) fillTable()
  const floats = new Float32Array(bits.length)
  for (let i = 0; i < bits.length; i++) floats[i] = table[bits[i]]
  return floats
}

function fillTable(): void {
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1
    const exponent = (bits >> 10) & 31
    const fraction = bits & 1023
    if (exponent === 31) table[bits] = fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY
    else if (exponent === 0) table[bits] = sign * fraction * 2 ** -24
    else table[bits] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15)
  }
  filled = true
}
