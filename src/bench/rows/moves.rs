//! Elements that only change their place, and the sums that are the adjoints of that.

use super::{Inputs, gradient};
use crate::bench::{Case, Check, Row};
use crate::tensor::Tensor;

pub(super) fn cases(cpu: bool) -> Vec<Case> {
    let edges = if cpu { 1 << 15 } else { 1 << 17 };
    vec![
        transpose(2048),
        heads([8, 1024, 16, 64]),
        concat([4096, 1024], [4096, 512]),
        embedding([8192, 512, 4096], false),
        embedding([8192, 512, 4096], true),
        gather([edges / 64, 64, edges]),
    ]
}

fn transpose(n: usize) -> Case {
    Case::new("transpose", format!("{n}x{n}"), move |gpu| {
        let inputs = Inputs::new(gpu, &[&[n, n]]);
        let checks = vec![Check { at: n + 2, want: inputs.host[0][2 * n + 1] as f64, bound: 0.0 }];
        Ok(inputs.row([8.0 * (n * n) as f64, 0.0], checks, |x| x[0].t().contiguous()))
    })
}

/// Heads split from a layer's output: the last axis stays, the two before change places.
fn heads(of: [usize; 4]) -> Case {
    let [batch, tokens, heads, size] = of;
    Case::new("contiguous", format!("{batch}x{tokens}x{heads}x{size} heads"), move |gpu| {
        let inputs = Inputs::new(gpu, &[&of]);
        let places =
            [[0, 0, 1, 3], [batch / 2, tokens / 2, heads - 1, 1], [batch - 1, tokens - 1, 0, size - 1]];
        let checks = places.map(|[b, t, h, i]| {
            let want = inputs.host[0][((b * tokens + t) * heads + h) * size + i] as f64;
            Check { at: ((b * heads + h) * tokens + t) * size + i, want, bound: 0.0 }
        });
        let bytes = 8.0 * of.iter().product::<usize>() as f64;
        Ok(inputs.row([bytes, 0.0], checks.to_vec(), |x| x[0].permute(&[0, 2, 1, 3]).contiguous()))
    })
}

/// Two arrays side by side, as features of different kinds are put together.
fn concat(a: [usize; 2], b: [usize; 2]) -> Case {
    let (rows, width) = (a[0], a[1] + b[1]);
    Case::new("concat", format!("{rows}x({}+{})", a[1], b[1]), move |gpu| {
        let inputs = Inputs::new(gpu, &[&a, &b]);
        let checks =
            [(1, 0), (rows / 2, a[1] - 1), (rows / 2, a[1]), (rows - 1, width - 1)].map(|(row, column)| {
                let (array, width, column) =
                    if column < a[1] { (0, a[1], column) } else { (1, b[1], column - a[1]) };
                let at = row * (a[1] + b[1]) + column + array * a[1];
                Check { at, want: inputs.host[array][row * width + column] as f64, bound: 0.0 }
            });
        let bytes = 8.0 * (rows * width) as f64;
        Ok(inputs.row([bytes, 0.0], checks.to_vec(), |x| Tensor::concat(&[&x[0], &x[1]], 1)))
    })
}

/// Rows of a table, and the adjoint that sums gradients by sorted index: `[rows, width, count]`.
fn embedding(of: [usize; 3], backward: bool) -> Case {
    let [rows, width, count] = of;
    let family = if backward { "embedding backward" } else { "embedding" };
    Case::new(family, format!("{count} of {rows}x{width}"), move |gpu| {
        let inputs = Inputs::new(gpu, &[&[rows, width], &[count, width]]);
        let ids: Vec<u32> = (0..count).map(|i| (i * 7919 % rows) as u32).collect();
        if backward {
            return Ok(summed(inputs, of, &ids, |table, ids| table.embedding(ids)));
        }
        let table = &inputs.host[0];
        let check = Check { at: width + 3, want: table[ids[1] as usize * width + 3] as f64, bound: 0.0 };
        let ids = Tensor::from_slice(gpu, &ids, [count]);
        // It reads the rows that it takes.
        let bytes = 8.0 * (width * count) as f64;
        Ok(inputs.row([bytes, 0.0], vec![check], move |x| x[0].embedding(&ids)))
    })
}

/// The gradient of features that many edges read from few nodes, 64 edges a node in no order: `[nodes, width, edges]`.
fn gather(of: [usize; 3]) -> Case {
    let [nodes, width, edges] = of;
    Case::new("index_select backward", format!("{edges} of {nodes}x{width}"), move |gpu| {
        let inputs = Inputs::new(gpu, &[&[nodes, width], &[edges, width]]);
        let ids: Vec<u32> = (0..edges).map(|i| (i * 7919 % nodes) as u32).collect();
        Ok(summed(inputs, of, &ids, |x, ids| x.index_select(0, ids)))
    })
}

/// The gradient of a table whose rows were taken.
fn summed(
    inputs: Inputs,
    [rows, width, count]: [usize; 3],
    ids: &[u32],
    take: impl Fn(&Tensor, &Tensor) -> Tensor,
) -> Row {
    let dy = &inputs.host[1];
    let checks = [(ids[1] as usize, 3), (rows - 1, width - 1)].map(|(row, column)| {
        let hits = (0..count).filter(|&i| ids[i] as usize == row).map(|i| dy[i * width + column] as f64);
        Check { at: row * width + column, want: hits.sum(), bound: 1e-5 }
    });
    let ids = Tensor::from_slice(inputs.sets[0][0].gpu(), ids, [count]);
    let leaves = inputs.sets.into_iter().map(|x| (x[0].requires_grad(), x[1].clone()));
    let graphs: Vec<_> = leaves.map(|(table, dy)| (take(&table, &ids), table, dy)).collect();
    let sets = graphs.len();
    let run = move |i: usize| {
        let (y, table, dy) = &graphs[i];
        gradient(y, dy, table)
    };
    // It reads the gradients of what was taken and writes the whole table's.
    let bytes = 4.0 * (width * (count + rows)) as f64;
    Row { sets, checks: checks.to_vec(), ..Row::new([bytes, 0.0], run) }
}
