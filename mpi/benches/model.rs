//! A model of what an exchange costs, through measured points, and to 1024 ranks.
//!
//! ```text
//! sum of B bytes on N ranks:  t = 2 (N - 1) a + 2 (N - 1)/N B b           all-to-all and all-gather, one message to each other rank
//! step:                       t = c + t_sum + B d                         c: one rank's part of the batch; d: readback and write
//! ```

use serde_json::Value;
use std::path::Path;
use tiebeam::chart::{self, Frame, Line};
use tiebeam::{Error, Result};

/// Latency of a message in seconds, and seconds for a byte.
struct Network {
    a: f64,
    b: f64,
}

impl Network {
    fn sum(&self, ranks: f64, bytes: f64) -> f64 {
        2.0 * (ranks - 1.0) * (self.a + bytes / ranks * self.b)
    }
}

/// Least squares of relative errors: of `t = a x + b y`, with `x/t` and `y/t` for 1.
fn fit(points: &[[f64; 3]]) -> Network {
    let mut m = [[0.0; 2]; 2];
    let mut right = [0.0; 2];
    for [x, y, t] in points {
        let row = [x / t, y / t];
        for i in 0..2 {
            right[i] += row[i];
            for j in 0..2 {
                m[i][j] += row[i] * row[j];
            }
        }
    }
    let det = m[0][0] * m[1][1] - m[0][1] * m[1][0];
    let a = (right[0] * m[1][1] - m[0][1] * right[1]) / det;
    let b = (m[0][0] * right[1] - m[1][0] * right[0]) / det;
    Network { a: a.max(0.0), b: b.max(0.0) }
}

fn number(line: &Value, name: &str) -> f64 {
    line[name].as_f64().unwrap_or(f64::NAN)
}

/// Fits the model to measured sums of as many ranks as there are cores, compares it with measured steps, and draws what it says of a
/// cluster.
pub fn draw(lines: &Path, picture: &Path) -> Result<()> {
    let text = std::fs::read_to_string(lines).map_err(|error| Error::io(lines, error))?;
    let read =
        |line: &str| serde_json::from_str(line).map_err(|error| Error::format(lines, error.to_string()));
    let all: Vec<Value> =
        text.lines().filter(|line| line.starts_with('{')).map(read).collect::<Result<_>>()?;
    let of = |kind: &'static str| all.iter().filter(move |line| line["line"] == kind);
    let point = |line: &Value| {
        let (ranks, bytes) = (number(line, "ranks"), 4.0 * number(line, "numbers"));
        [2.0 * (ranks - 1.0), 2.0 * (ranks - 1.0) / ranks * bytes, number(line, "ms") / 1e3]
    };
    let cores = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
    for ranks in [2.0, 4.0] {
        let points: Vec<_> = of("sum").filter(|line| number(line, "ranks") == ranks).map(point).collect();
        let here = fit(&points);
        println!("{ranks} ranks here: {:.2} us a message, {:.2} GB/s", 1e6 * here.a, 1e-9 / here.b);
        for line in of("sum").filter(|line| number(line, "ranks") == ranks) {
            let predicted = 1e3 * here.sum(ranks, 4.0 * number(line, "numbers"));
            let measured = number(line, "ms");
            println!(
                "  sum of {:9} numbers: measured {measured:8.3} ms, model {predicted:8.3} ms ({:.2})",
                number(line, "numbers"),
                predicted / measured
            );
        }
        for step in of("step").filter(|line| number(line, "ranks") == ranks) {
            let same = |line: &&Value| line["sharing"] == step["sharing"];
            // More ranks than cores compute in turn. That was measured on as many ranks as there are cores.
            let turns = (ranks / cores).max(1.0);
            let least = of("step").filter(same).find(|line| number(line, "ranks") == ranks.min(cores));
            let exchange = of("exchange").filter(same).find(|line| number(line, "ranks") == ranks);
            let (Some(least), Some(exchange)) = (least, exchange) else { continue };
            let alone = turns * number(least, "alone_ms");
            let predicted = alone + number(exchange, "ms");
            println!(
                "  step, {:10}: measured {:8.2} ms, one rank {:.2} and exchange {:.2} together {predicted:8.2} ms ({:.2})",
                step["sharing"].as_str().unwrap_or_default(),
                number(step, "ms"),
                alone,
                number(exchange, "ms"),
                number(step, "ms") / predicted
            );
        }
    }
    cluster(picture)
}

/// A cluster of cards with 100 Gbit/s between them.
const CLUSTER: Network = Network { a: 2e-6, b: 1.0 / 12.5e9 };
/// Seconds for a byte that is read back from a card and written again, at 20 GB/s each way, which overlap.
const HOST: f64 = 1.0 / 20e9;
/// Seconds of a card for its part of a batch.
const COMPUTE: f64 = 0.25;

/// Seconds of a card for a direction of one parameter: 75 operations of integers, at 30 T a second.
const DIRECTION: f64 = 75.0 / 30e12;

/// How much of the time is computing, for a model of 24 blocks of 12.6M numbers with 51.5M beside them.
fn cluster(picture: &Path) -> Result<()> {
    let (block, rest) = (12.6e6, 51.5e6);
    let kinds = [("untied", 24.0), ("dictionary of a third", 8.0), ("tied 4 times", 6.0), ("one block", 1.0)];
    let ranks: Vec<f64> = (0..=10).map(|k| f64::from(1u32 << k)).collect();
    let of = |blocks: f64, n: f64| {
        let bytes = 4.0 * (blocks * block + rest);
        let exchange = if n > 1.0 { CLUSTER.sum(n, bytes) + bytes * HOST } else { 0.0 };
        100.0 * COMPUTE / (COMPUTE + exchange)
    };
    let line = |(name, blocks): (&str, f64)| {
        let points = ranks.iter().map(|&n| (n.log2(), of(blocks, n))).collect();
        Line::new(format!("{name}, {:.0} MB a step", 4e-6 * (blocks * block + rest)), points)
    };
    for (name, blocks) in kinds {
        let shares = [2.0, 16.0, 128.0, 1024.0].map(|n| format!("{:.0}", of(blocks, n)));
        println!("{name}: {} % computing on 2, 16, 128, 1024 ranks", shares.join(", "));
    }
    let mut all: Vec<Line> = kinds.map(line).into();
    let byte = |n: f64| {
        let directions = n * (24.0 * block + rest) * DIRECTION;
        100.0 * COMPUTE / (COMPUTE + 2.0 * (n - 1.0) * CLUSTER.a + directions)
    };
    let shares = [2.0, 16.0, 128.0, 1024.0].map(|n| format!("{:.0}", byte(n)));
    println!("one byte: {} % computing on 2, 16, 128, 1024 ranks", shares.join(", "));
    all.push(Line::new("untied, by one byte a step", ranks.iter().map(|&n| (n.log2(), byte(n))).collect()));
    let title =
        "Model: 0.25 s of computing a step on each rank, 2 us and 12.5 GB/s a message, 20 GB/s to the card";
    let frame =
        Frame { title, x: "ranks, as a power of 2", y: "% of the time computing", logarithmic: false };
    chart::lines(picture, &frame, &all)
}
