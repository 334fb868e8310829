// The scale of a row and the correction of its mean, for forward of norm.wgsl and norm_rows.wgsl.

// A scale with which no row's sum overflows. A scaled sum that is not finite then means that the row contains an infinity.
const SMALL: f32 = 0x1p-100f;

// r = 1 / sqrt(variance + eps) and q of x^ = (x - mean) r + q, from the means of the deviations (in rms_norm of SMALL times the
// elements) and of their squares. The mean of the deviations is the rounding error of the mean, which the correction of Chan, Golub
// & LeVeque removes.
fn scale_of(moments: vec2<f32>) -> vec2<f32> {
    let left = select(0.0, moments.x, CENTRED);
    let variance = moments.y - left * left;
    // Rounding may make the variance negative, which is set to 0. max would lose a NaN, so the test is on the bits, from -0 to
    // -infinity.
    let below = bitcast<u32>(variance) >= 0x80000000u && bitcast<u32>(variance) <= 0xff800000u;
    let root = inverseSqrt(select(variance, 0.0, below) + p.eps);
    // In rms_norm, a row with an infinity has 0 at its finite elements, by the formula. Only an overflow is made NaN.
    let r = pick1(finite_or_nan1(root, variance), root, !CENTRED && !finite1(moments.x));
    return vec2<f32>(r, -left * r);
}
