//! Test cases of views and copies.

use crate::dtype::DType;
use crate::ops::case::{Array, Case, Input};
use crate::ops::timed::{Want, When};
use crate::shape::Shape;
use crate::tensor::Tensor;

/// The reference of any view: element `i` of the result is element `from(i)` of the input.
fn gathered(shape: impl Into<Shape>, x: &Array, from: impl Fn(usize) -> usize) -> Array {
    Array::from_fn(shape, |i| x.data[from(i)])
}

/// A copy whose element `i` is the input's element `from(i)`.
fn moved(
    family: &'static str,
    name: String,
    [input, output]: [Shape; 2],
    elements: impl Into<Vec<usize>>,
    forward: fn(&Tensor) -> Tensor,
    from: impl Fn(usize) -> usize + Copy + Send + Sync + 'static,
) -> Case {
    Case::new(
        name,
        vec![Input::normal(input)],
        move |x| forward(&x[0]),
        move |x| gathered(output, &x[0], from),
    )
    .timed(family, elements, move |x, at| Want { value: x[0].data[from(at)], bound: 0.0 })
}

/// A square matrix transposed.
fn transpose(n: usize) -> Case {
    let shapes = [[n, n].into(), [n, n].into()];
    moved(
        "transpose",
        format!("{n}x{n}"),
        shapes,
        [n + 2],
        |x| x.t().contiguous(),
        move |i| i % n * n + i / n,
    )
}

/// The heads of a layer's output are split. The last axis stays, and the two before it are exchanged.
fn heads([batch, tokens, heads, size]: [usize; 4]) -> Case {
    let shapes = [[batch, tokens, heads, size].into(), [batch, heads, tokens, size].into()];
    let places = [[0, 0, 0, 3], [batch / 2, heads - 1, tokens / 2, 1], [batch - 1, 0, tokens - 1, size - 1]];
    let elements = places.map(|[b, h, t, i]| ((b * heads + h) * tokens + t) * size + i);
    let name = format!("{batch}x{tokens}x{heads}x{size} heads");
    moved(
        "contiguous",
        name,
        shapes,
        elements,
        |x| x.transpose(1, 2).contiguous(),
        move |at| {
            let (rest, i) = (at / size, at % size);
            let (b, h, t) = (rest / (heads * tokens), rest / tokens % heads, rest % tokens);
            ((b * tokens + t) * heads + h) * size + i
        },
    )
}

/// Two arrays side by side, as features of different kinds are put together.
fn concat(rows: usize, [left, right]: [usize; 2]) -> Case {
    let width = left + right;
    let one = move |x: &[Array], at: usize| match at % width {
        column if column < left => x[0].data[at / width * left + column],
        column => x[1].data[at / width * right + column - left],
    };
    let elements = [width, rows / 2 * width + left - 1, rows / 2 * width + left, rows * width - 1];
    Case::new(
        format!("{rows}x({left}+{right})"),
        vec![Input::normal([rows, left]), Input::normal([rows, right])],
        |x| Tensor::concat(&[&x[0], &x[1]], 1),
        move |x| Array::from_fn([rows, width], |i| one(x, i)),
    )
    .timed("concat", elements, move |x, at| Want { value: one(x, at), bound: 0.0 })
}

pub(in crate::ops) fn cases() -> Vec<Case> {
    let quick = |case: Case| case.when(When::Quick, When::Quick);
    let mut all = vec![
        quick(transpose(2048)),
        quick(heads([8, 1024, 16, 64])),
        quick(concat(4096, [1024, 512])),
        transpose(12),
        heads([3, 4, 5, 8]),
        concat(7, [5, 8]),
    ];
    all.extend(small());
    all.extend([DType::F16, DType::Bf16].into_iter().flat_map(halves));
    all
}

/// Two arrays of f16 or bf16 side by side.
fn half_concat(dtype: DType, [left, right]: [usize; 2]) -> Case {
    let input = |width: usize| Input::normal([3, width]).dtype(dtype).fixed();
    let width = left + right;
    Case::new(
        format!("concat of {dtype} {left}+{right}"),
        vec![input(left), input(right)],
        |x| Tensor::concat(&[&x[0], &x[1]], 1),
        move |x| {
            Array::from_fn([3, width], |i| match i % width {
                c if c < left => x[0].data[i / width * left + c],
                c => x[1].data[i / width * right + c - left],
            })
        },
    )
}

/// Copies of elements of which two share a word.
fn halves(dtype: DType) -> Vec<Case> {
    vec![
        // Pairs in words, and pairs that would be torn apart.
        half_concat(dtype, [2, 6]),
        half_concat(dtype, [3, 6]),
        half_concat(dtype, [8, 16]),
        Case::new(
            format!("part in vectors of {dtype}"),
            vec![Input::normal([5, 16]).dtype(dtype).fixed()],
            |x| x[0].slice(1, 4..12).scale(2.0),
            |x| Array::from_fn([5, 8], |i| 2.0 * x[0].data[i / 8 * 16 + 4 + i % 8]),
        ),
        Case::new(
            format!("slice {dtype}"),
            vec![Input::normal([4, 9]).dtype(dtype).fixed()],
            |x| x[0].slice(1, 1..8),
            |x| gathered([4, 7], &x[0], |i| i / 7 * 9 + 1 + i % 7),
        ),
        Case::new(
            format!("pad of {dtype}"),
            vec![Input::normal([3, 6]).dtype(dtype).fixed()],
            |x| x[0].pad(1, 2, 4),
            |x| {
                Array::from_fn([3, 12], |i| match i % 12 {
                    c @ 2..8 => x[0].data[i / 12 * 6 + c - 2],
                    _ => 0.0,
                })
            },
        ),
    ]
}

fn small() -> Vec<Case> {
    vec![
        // Sizes in whole vectors, which are copied in blocks or read four at a time.
        Case::new(
            "transposed copy",
            vec![Input::normal([36, 40])],
            |x| x[0].t().contiguous(),
            |x| gathered([40, 36], &x[0], |i| i % 36 * 40 + i / 36),
        ),
        Case::new(
            "transposed copies of a part",
            vec![Input::normal([3, 8, 44])],
            |x| x[0].slice(2, 4..40).transpose(1, 2).contiguous(),
            |x| gathered([3, 36, 8], &x[0], |i| i / 288 * 352 + i % 8 * 44 + 4 + i / 8 % 36),
        ),
        Case::new(
            "transposed integers",
            vec![Input::integers([8, 12], DType::U32, 0, 1 << 20)],
            |x| x[0].t().contiguous(),
            |x| gathered([12, 8], &x[0], |i| i % 8 * 12 + i / 8),
        )
        .exact(),
        Case::new(
            "heads",
            vec![Input::normal([2, 5, 3, 8])],
            |x| x[0].transpose(1, 2).contiguous(),
            |x| gathered([2, 3, 5, 8], &x[0], |i| i / 120 * 120 + i / 8 % 5 * 24 + i / 40 % 3 * 8 + i % 8),
        ),
        Case::new(
            "part in vectors",
            vec![Input::normal([5, 16])],
            |x| x[0].slice(1, 4..12).scale(2.0),
            |x| Array::from_fn([5, 8], |i| 2.0 * x[0].data[i / 8 * 16 + 4 + i % 8]),
        ),
        Case::new(
            "reshape of a transpose",
            vec![Input::normal([5, 7])],
            |x| x[0].t().reshape([7, 5]).scale(2.0),
            |x| Array::from_fn([7, 5], |i| 2.0 * x[0].data[i % 5 * 7 + i / 5]),
        ),
        Case::new(
            "permute",
            vec![Input::normal([2, 3, 5])],
            |x| x[0].permute([2, 0, 1]),
            |x| gathered([5, 2, 3], &x[0], |i| (i / 3 % 2) * 15 + (i % 3) * 5 + i / 6),
        ),
        Case::new(
            "slice",
            vec![Input::normal([4, 9])],
            |x| x[0].slice(1, 2..7),
            |x| gathered([4, 5], &x[0], |i| i / 5 * 9 + 2 + i % 5),
        ),
        Case::new(
            "expand",
            vec![Input::normal([3, 1])],
            |x| x[0].expand([2, 3, 4]),
            |x| gathered([2, 3, 4], &x[0], |i| i / 4 % 3),
        )
        .ulps(4.0, 16.0),
        Case::new(
            "unsqueeze and squeeze",
            vec![Input::normal([3, 5])],
            |x| x[0].t().unsqueeze(1).squeeze(-2),
            |x| gathered([5, 3], &x[0], |i| i % 3 * 5 + i / 3),
        ),
        Case::new(
            "pad",
            vec![Input::normal([3, 5])],
            |x| x[0].pad(1, 2, 1),
            |x| {
                Array::from_fn([3, 8], |i| match i % 8 {
                    c @ 2..7 => x[0].data[i / 8 * 5 + c - 2],
                    _ => 0.0,
                })
            },
        ),
        Case::new(
            "concat",
            vec![Input::normal([3, 5]), Input::normal([3, 1]), Input::normal([3, 70])],
            |x| Tensor::concat(&[&x[0], &x[1], &x[2]], 1),
            |x| {
                Array::from_fn([3, 76], |i| match i % 76 {
                    c @ 0..5 => x[0].data[i / 76 * 5 + c],
                    5 => x[1].data[i / 76],
                    c => x[2].data[i / 76 * 70 + c - 6],
                })
            },
        ),
        Case::new(
            "concat in vectors",
            vec![Input::normal([3, 4]), Input::normal([3, 8])],
            |x| Tensor::concat(&[&x[0], &x[1]], 1),
            |x| {
                Array::from_fn([3, 12], |i| match i % 12 {
                    c @ 0..4 => x[0].data[i / 12 * 4 + c],
                    c => x[1].data[i / 12 * 8 + c - 4],
                })
            },
        ),
        // The first axes are the grid's.
        Case::new(
            "heads of whole workgroups",
            vec![Input::normal([2, 8, 3, 32]).fixed()],
            |x| x[0].transpose(1, 2).scale(2.0),
            |x| {
                Array::from_fn([2, 3, 8, 32], |i| {
                    2.0 * x[0].data[i / 768 * 768 + i / 32 % 8 * 96 + i / 256 % 3 * 32 + i % 32]
                })
            },
        ),
        Case::new(
            "rows of whole workgroups",
            vec![Input::normal([3, 512]).fixed(), Input::normal([1, 256]).fixed()],
            |x| x[0].slice(1, 256..512).mul(&x[1]).add(&x[0].slice(1, 0..256)),
            |x| {
                Array::from_fn([3, 256], |i| {
                    let row = &x[0].data[i / 256 * 512..];
                    row[256 + i % 256] * x[1].data[i % 256] + row[i % 256]
                })
            },
        ),
        Case::new(
            "stack",
            vec![Input::integers([7], DType::U32, 0, 99), Input::integers([7], DType::U32, 0, 99)],
            |x| Tensor::stack(&[&x[0], &x[1]], 1),
            |x| Array::from_fn([7, 2], |i| x[i % 2].data[i / 2]),
        )
        .exact(),
        Case::new(
            "split",
            vec![Input::normal([2, 9])],
            |x| {
                let parts = x[0].split(1, [2, 4, 3]);
                Tensor::concat(&[&parts[2], &parts[0], &parts[1]], 1)
            },
            |x| gathered([2, 9], &x[0], |i| i / 9 * 9 + [6, 7, 8, 0, 1, 2, 3, 4, 5][i % 9]),
        ),
    ]
}
