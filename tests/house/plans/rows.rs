//! The plans of kernels over rows and columns, and of sums by index.

use super::Expected;

#[rustfmt::skip]
pub const ROWS: &[Expected] = &[
    ("h200", "sum 1x131072x64", &[
        "reduce_columns columns: 256 workgroups of 256, 256 parts, 33.6 MB",
        "reduce_columns columns: 4 workgroups of 256, 65.8 kB",
    ]),
    ("h200", "sum 1x4096x1024", &[
        "reduce_columns columns: 256 workgroups of 256, 32 parts, 16.9 MB",
        "reduce_columns columns: 32 workgroups of 256, 135.2 kB",
    ]),
    ("h200", "sum 1x256x768", &[
        "reduce_columns columns: 48 workgroups of 256, 789.5 kB",
    ]),
    ("h200", "sum 1x16777216x1", &[
        "reduce_rows rows AHEAD=4 LANES=64: 1056 workgroups of 64, 1056 parts, 67.1 MB",
        "reduce_rows rows AHEAD=4 LANES=64: 1 workgroups of 64, 4.2 kB",
    ]),
    ("h200", "sum 4096x1024x1", &[
        "reduce_rows rows AHEAD=4 LANES=64: 4096 workgroups of 64, 16.8 MB",
    ]),
    ("h200", "sum 16x50257x1", &[
        "reduce_columns columns: 64 workgroups of 256, 4 parts, 3.2 MB",
        "reduce columns: 1 workgroups of 64, 320 B",
    ]),
    ("h200", "sum 131072x64x1", &[
        "reduce_rows rows AHEAD=4 LANES=8: 16384 workgroups of 64, 34.1 MB",
    ]),
    ("h200", "gradient of a norm's gain 256x768", &[
        "norm_columns columns: 48 workgroups of 256, 1.6 MB",
    ]),
    ("h200", "gradient of a norm's gain 4096x768", &[
        "norm_columns columns: 258 workgroups of 256, 43 parts, 25.5 MB",
        "reduce_columns columns: 96 workgroups of 256, 270.3 kB",
    ]),
    ("h200", "layer_norm 256x768", &[
        "norm_rows forward HELD=4 LANES=64: 256 workgroups of 64, 1.6 MB",
    ]),
    ("h200", "layer_norm 4096x768", &[
        "norm_rows forward HELD=4 LANES=64: 4096 workgroups of 64, 25.2 MB",
    ]),
    ("h200", "layer_norm 16x8192", &[
        "norm_rows forward HELD=8 LANES=256: 16 workgroups of 256, 1.1 MB",
    ]),
    ("h200", "softmax 256x1024", &[
        "softmax forward AHEAD=4 LANES=64: 256 workgroups of 64, 2.1 MB",
    ]),
    ("h200", "softmax 4096x1024", &[
        "softmax forward AHEAD=4 LANES=64: 4096 workgroups of 64, 33.6 MB",
    ]),
    ("h200", "softmax 16x50256", &[
        "softmax forward AHEAD=4 LANES=256: 16 workgroups of 256, 6.4 MB",
    ]),
    ("h200", "cross_entropy 4096x1024", &[
        "cross_entropy forward AHEAD=4 LANES=64: 4096 workgroups of 64, 16.9 MB",
        "cross_entropy total AHEAD=1 LANES=64: 1 workgroups of 256, 32.8 kB",
    ]),
    ("h200", "cross_entropy 16x50256", &[
        "cross_entropy forward AHEAD=4 LANES=256: 16 workgroups of 256, 3.2 MB",
        "cross_entropy total AHEAD=1 LANES=64: 1 workgroups of 256, 128 B",
    ]),
    ("h200", "gradient of an embedding 8192x512x4096", &[
        "embedding_sum order PLACES=4096: 512 workgroups of 256, 16.9 MB",
        "embedding_sum runs PLACES=4096: 256 workgroups of 256, 16.8 MB",
        "embedding_sum join PLACES=4096: 2048 workgroups of 256, 8.2 kB",
    ]),
    ("h200", "gradient of an embedding 128x128x8192", &[
        "embedding_sum order PLACES=8192: 128 workgroups of 256, 229.4 kB",
        "embedding_sum runs PLACES=8192: 128 workgroups of 256, 4.4 MB",
        "embedding_sum join PLACES=8192: 1024 workgroups of 256, 16.4 kB",
    ]),
    ("h200", "gradient of an embedding 2048x64x131072", &[
        "embedding_sum describe PLACES=1024: 512 workgroups of 256, 3.1 MB",
        "embedding_sum runs PLACES=1024: 265 workgroups of 256, 36.2 MB",
        "embedding_sum join PLACES=1024: 4229 workgroups of 256, 67.7 kB",
    ]),
    ("integrated", "sum 1x131072x64", &[
        "reduce_columns columns: 16 workgroups of 256, 16 parts, 33.6 MB",
        "reduce columns: 1 workgroups of 64, 4.4 kB",
    ]),
    ("integrated", "sum 1x4096x1024", &[
        "reduce_columns columns: 16 workgroups of 256, 16.8 MB",
    ]),
    ("integrated", "sum 1x256x768", &[
        "reduce_columns columns: 24 workgroups of 256, 789.5 kB",
    ]),
    ("integrated", "sum 1x16777216x1", &[
        "reduce_rows rows AHEAD=4 LANES=64: 256 workgroups of 64, 256 parts, 67.1 MB",
        "reduce_rows rows AHEAD=4 LANES=64: 1 workgroups of 64, 1.0 kB",
    ]),
    ("integrated", "sum 4096x1024x1", &[
        "reduce_rows rows AHEAD=4 LANES=64: 4096 workgroups of 64, 16.8 MB",
    ]),
    ("integrated", "sum 16x50257x1", &[
        "reduce_columns columns: 16 workgroups of 256, 3.2 MB",
    ]),
    ("integrated", "sum 131072x64x1", &[
        "reduce_rows rows AHEAD=4 LANES=8: 16384 workgroups of 64, 34.1 MB",
    ]),
    ("integrated", "gradient of a norm's gain 256x768", &[
        "norm_columns columns: 24 workgroups of 256, 1.6 MB",
    ]),
    ("integrated", "gradient of a norm's gain 4096x768", &[
        "norm_columns columns: 24 workgroups of 256, 25.2 MB",
    ]),
    ("integrated", "layer_norm 256x768", &[
        "norm_rows forward HELD=4 LANES=64: 256 workgroups of 64, 1.6 MB",
    ]),
    ("integrated", "layer_norm 4096x768", &[
        "norm_rows forward HELD=4 LANES=64: 4096 workgroups of 64, 25.2 MB",
    ]),
    ("integrated", "layer_norm 16x8192", &[
        "norm_rows forward HELD=8 LANES=256: 16 workgroups of 256, 1.1 MB",
    ]),
    ("integrated", "softmax 256x1024", &[
        "softmax forward AHEAD=4 LANES=64: 256 workgroups of 64, 2.1 MB",
    ]),
    ("integrated", "softmax 4096x1024", &[
        "softmax forward AHEAD=4 LANES=64: 4096 workgroups of 64, 33.6 MB",
    ]),
    ("integrated", "softmax 16x50256", &[
        "softmax forward AHEAD=4 LANES=256: 16 workgroups of 256, 6.4 MB",
    ]),
    ("integrated", "cross_entropy 4096x1024", &[
        "cross_entropy forward AHEAD=4 LANES=64: 4096 workgroups of 64, 16.9 MB",
        "cross_entropy total AHEAD=1 LANES=64: 1 workgroups of 256, 32.8 kB",
    ]),
    ("integrated", "cross_entropy 16x50256", &[
        "cross_entropy forward AHEAD=4 LANES=256: 16 workgroups of 256, 3.2 MB",
        "cross_entropy total AHEAD=1 LANES=64: 1 workgroups of 256, 128 B",
    ]),
    ("integrated", "gradient of an embedding 8192x512x4096", &[
        "embedding_sum order PLACES=4096: 256 workgroups of 256, 16.9 MB",
        "embedding_sum runs PLACES=4096: 256 workgroups of 256, 16.8 MB",
        "embedding_sum join PLACES=4096: 2048 workgroups of 256, 8.2 kB",
    ]),
    ("integrated", "gradient of an embedding 128x128x8192", &[
        "embedding_sum describe PLACES=1024: 32 workgroups of 256, 229.4 kB",
        "embedding_sum runs PLACES=1024: 128 workgroups of 256, 4.4 MB",
        "embedding_sum join PLACES=1024: 1024 workgroups of 256, 16.4 kB",
    ]),
    ("integrated", "gradient of an embedding 2048x64x131072", &[
        "embedding_sum describe PLACES=1024: 512 workgroups of 256, 3.1 MB",
        "embedding_sum runs PLACES=1024: 256 workgroups of 256, 36.2 MB",
        "embedding_sum join PLACES=1024: 4096 workgroups of 256, 65.5 kB",
    ]),
    ("cpu", "sum 1x131072x64", &[
        "reduce columns: 8 workgroups of 64, 32 parts, 33.6 MB",
        "reduce columns: 1 workgroups of 64, 8.4 kB",
    ]),
    ("cpu", "sum 1x4096x1024", &[
        "reduce columns: 4 workgroups of 64, 16.8 MB",
    ]),
    ("cpu", "sum 1x256x768", &[
        "reduce columns: 6 workgroups of 64, 2 parts, 792.6 kB",
        "reduce columns: 3 workgroups of 64, 9.2 kB",
    ]),
    ("cpu", "sum 1x16777216x1", &[
        "reduce_rows rows AHEAD=1 LANES=1: 64 workgroups of 64, 4096 parts, 67.1 MB",
        "reduce_rows rows AHEAD=1 LANES=64: 1 workgroups of 64, 16.4 kB",
    ]),
    ("cpu", "sum 4096x1024x1", &[
        "reduce_rows rows AHEAD=1 LANES=1: 64 workgroups of 64, 16.8 MB",
    ]),
    ("cpu", "sum 16x50257x1", &[
        "reduce rows: 208 workgroups of 64, 13 parts, 3.2 MB",
        "reduce rows: 16 workgroups of 64, 896 B",
    ]),
    ("cpu", "sum 131072x64x1", &[
        "reduce_rows rows AHEAD=1 LANES=1: 2048 workgroups of 64, 34.1 MB",
    ]),
    ("cpu", "gradient of a norm's gain 256x768", &[
        "norm columns LANES=64: 6 workgroups of 64, 2 parts, 1.6 MB",
        "reduce columns: 6 workgroups of 64, 18.4 kB",
    ]),
    ("cpu", "gradient of a norm's gain 4096x768", &[
        "norm columns LANES=64: 6 workgroups of 64, 2 parts, 25.2 MB",
        "reduce columns: 6 workgroups of 64, 18.4 kB",
    ]),
    ("cpu", "layer_norm 256x768", &[
        "norm forward LANES=1: 4 workgroups of 64, 1.6 MB",
    ]),
    ("cpu", "layer_norm 4096x768", &[
        "norm forward LANES=1: 64 workgroups of 64, 25.2 MB",
    ]),
    ("cpu", "layer_norm 16x8192", &[
        "norm forward LANES=64: 16 workgroups of 64, 1.1 MB",
    ]),
    ("cpu", "softmax 256x1024", &[
        "softmax forward AHEAD=1 LANES=1: 4 workgroups of 64, 2.1 MB",
    ]),
    ("cpu", "softmax 4096x1024", &[
        "softmax forward AHEAD=1 LANES=1: 64 workgroups of 64, 33.6 MB",
    ]),
    ("cpu", "softmax 16x50256", &[
        "softmax forward AHEAD=1 LANES=64: 16 workgroups of 64, 6.4 MB",
    ]),
    ("cpu", "cross_entropy 4096x1024", &[
        "cross_entropy forward AHEAD=1 LANES=1: 64 workgroups of 64, 16.9 MB",
        "cross_entropy total AHEAD=1 LANES=64: 1 workgroups of 256, 32.8 kB",
    ]),
    ("cpu", "cross_entropy 16x50256", &[
        "cross_entropy forward AHEAD=1 LANES=64: 16 workgroups of 64, 3.2 MB",
        "cross_entropy total AHEAD=1 LANES=64: 1 workgroups of 256, 128 B",
    ]),
    ("cpu", "gradient of an embedding 8192x512x4096", &[
        "embedding clear: 16384 workgroups of 64, 16.8 MB",
        "embedding sum_runs CHUNK=32: 256 workgroups of 64, 17.3 MB",
        "embedding sum_runs CHUNK=32: 16 workgroups of 64, 1.1 MB",
        "embedding sum_runs CHUNK=32: 2 workgroups of 64, 69.7 kB",
    ]),
    ("cpu", "gradient of an embedding 128x128x8192", &[
        "embedding clear: 64 workgroups of 64, 65.5 kB",
        "embedding sum_runs CHUNK=32: 128 workgroups of 64, 4.6 MB",
        "embedding sum_runs CHUNK=32: 8 workgroups of 64, 346.2 kB",
        "embedding sum_runs CHUNK=32: 1 workgroups of 64, 33.9 kB",
    ]),
    ("cpu", "gradient of an embedding 2048x64x131072", &[
        "embedding clear: 512 workgroups of 64, 524.3 kB",
        "embedding sum_runs CHUNK=32: 1024 workgroups of 64, 37.3 MB",
        "embedding sum_runs CHUNK=32: 64 workgroups of 64, 2.8 MB",
        "embedding sum_runs CHUNK=32: 4 workgroups of 64, 272.5 kB",
        "embedding sum_runs CHUNK=32: 1 workgroups of 64, 17.0 kB",
    ]),
];
