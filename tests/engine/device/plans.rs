//! Plans equal the dispatches that run. Also classes of devices, and work that is divided because it would take too long.

use super::folder::Folder;
use super::*;
use tiebeam::Options;
use tiebeam::Step;
use tiebeam::gpu::Tuning;
use tiebeam::gpu::plan::Pass;
use tiebeam::nn::Mask;
use tiebeam::ops::moves::embedding_sum;
use tiebeam::ops::product::matmul;
use tiebeam::ops::product::matmul::plan::{ProductKind, Sizes};
use tiebeam::ops::reduction::{norm, reduce, softmax};
use tiebeam::ops::sequence::attention;
use tiebeam::ops::sequence::rope::{Pairing, Rope};
use tiebeam::optim::{AdamW, AdamWConfig, Group};
use tiebeam::share::{DepthLora, Dictionary, LowRank};

fn of_class(name: &str) -> Gpu {
    let options = Options::default().device(Some(name.into()));
    Gpu::open_with(options).expect("these tests need an adapter")
}

fn normal(gpu: &Gpu, shape: &[usize]) -> Tensor {
    let mut data = vec![0.0; shape.iter().product()];
    Rng::new(5).fill_normal(&mut data);
    let x = Tensor::from_slice(gpu, &data, shape);
    x.evaluate();
    x
}

/// Returns the dispatches of `work` whose kernels' names begin with one of `words`.
fn seen(gpu: &Gpu, words: &[&str], work: impl FnOnce() -> Tensor) -> Vec<String> {
    let passes = gpu.planned(|| work().evaluate()).expect("no fault");
    let named =
        passes.iter().map(Pass::to_string).filter(|name| words.iter().any(|word| name.starts_with(word)));
    named.collect()
}

/// Returns the lines of dispatches up to workgroups and parts, without bytes and operations.
fn kernels(all: &[String]) -> Vec<&str> {
    all.iter()
        .map(|line| line.split("B,").next().unwrap_or(line).rsplit_once(", ").map_or("", |x| x.0))
        .collect()
}

#[test]
fn what_is_planned_is_what_runs() {
    for name in ["h200", "integrated", "cpu"] {
        let gpu = of_class(name);
        // An adapter may have fewer lanes and less memory than its class.
        let class = gpu.class().clone();
        let lines = |passes: &[Pass]| -> Vec<String> { passes.iter().map(Pass::to_string).collect() };
        for [m, k, n] in [[8, 2048, 256], [64, 4096, 64], [60, 1000, 36], [128, 128, 128], [3, 5, 7]] {
            let (a, b) = (normal(&gpu, &[m, k]), normal(&gpu, &[k, n]));
            let sizes = Sizes {
                batch: 1,
                m,
                n,
                k,
                turned: [false; 2],
                half: false,
                coop: None,
                kind: ProductKind::Tensors,
            };
            let want = lines(&matmul::plan::plan(&class, sizes));
            let got = seen(&gpu, &["matmul", "reduce"], || a.matmul(&b));
            // If loads are not whole vectors, or the last part is shorter, the bindings differ from the plan.
            let even = k.is_multiple_of(64) && n.is_multiple_of(4);
            let same = if even { got == want } else { kernels(&got) == kernels(&want) };
            assert!(same, "{name} {m}x{k}x{n}: {got:?}, planned {want:?}");
        }
        // A weight that is computed in the loads, and rows that are added at the places of a list.
        let theta = normal(&gpu, &[256, 128]);
        let site = LowRank::new(&theta, &normal(&gpu, &[4, 128]), &normal(&gpu, &[256, 4]), 0.5).shared();
        for rows in [4, 40] {
            let (turned, half, coop) = ([false, true], false, None);
            let sizes = |kind| Sizes { batch: 1, m: rows, n: 256, k: 128, turned, half, coop, kind };
            let planned = |kind| lines(&matmul::plan::plan(&class, sizes(kind)));
            let (x, y) = (normal(&gpu, &[rows, 128]), normal(&gpu, &[64, 256]));
            let got = seen(&gpu, &["matmul", "reduce"], || x.linear(&site, Epilogue::default()));
            assert_eq!(kernels(&got), kernels(&planned(ProductKind::Site)), "{name}: {rows} rows by a site");
            let list = Tensor::from_slice(&gpu, &(0..rows as u32).collect::<Vec<_>>(), [rows]);
            let (gate, weight) = (normal(&gpu, &[rows]), tied(&theta));
            let got = seen(&gpu, &["matmul", "reduce"], || y.add_linear_scattered(&x, &list, &gate, &weight));
            assert_eq!(
                kernels(&got),
                kernels(&planned(ProductKind::Scattered)),
                "{name}: {rows} rows scattered"
            );
        }
        for [outer, size, inner] in [[1, 4096, 64], [4, 100_000, 1], [300, 64, 1], [4, 5000, 3]] {
            let x = normal(&gpu, &[outer, size, inner]);
            let got = seen(&gpu, &["reduce"], || x.sum(1));
            assert_eq!(got, lines(&reduce::plan(&class, [outer, size, inner])), "{name}: sum");
        }
        let x = normal(&gpu, &[300, 64]);
        let want = lines(&softmax::plan_rows(&class, [300, 64]));
        assert_eq!(seen(&gpu, &["softmax"], || x.softmax(-1)), want, "{name}: softmax");
        let ones = normal(&gpu, &[64]);
        let got = seen(&gpu, &["norm"], || x.layer_norm(Some(&ones), Some(&ones), 1e-5));
        assert_eq!(got, lines(&norm::plan(&class, [300, 64])[0]), "{name}: layer norm");
        let gain = normal(&gpu, &[64]).requires_grad();
        let y = x.layer_norm(Some(&gain), None, 1e-5);
        let got = seen(&gpu, &["norm columns", "norm_columns", "reduce"], || {
            let grads = y.backward_with(&x).expect("no fault");
            grads.get(&gain).expect("a gradient").clone()
        });
        assert_eq!(kernels(&got), kernels(&lines(&norm::plan(&class, [300, 64])[1])), "{name}: its gain");
        let (q, kv) = (normal(&gpu, &[2, 4, 1, 64]), normal(&gpu, &[2, 2, 512, 64]));
        let got = seen(&gpu, &["attention"], || q.attention(&kv, &kv, &Mask::None));
        // Keys and values are the same tensor here, bound twice.
        assert_eq!(got, lines(&attention::plan(&class, [2, 4, 2, 1, 512, 64], None)[0]), "{name}: attention");
        let [q, k, v] = [4, 2, 2].map(|heads| normal(&gpu, &[2, heads, 96, 64]).requires_grad());
        let y = q.attention(&k, &v, &Mask::None);
        let kernels_of = [
            "attention_backward queries",
            "attention_backward keys",
            "attention_tiled_backward queries",
            "attention_tiled_backward keys",
            "attention_queries queries",
        ];
        let got = seen(&gpu, &kernels_of, || {
            let grads = y.backward_with(&y.detach()).expect("no fault");
            grads.get(&q).expect("a gradient").clone()
        });
        let [_, backward] = attention::plan(&class, [2, 4, 2, 96, 96, 64], None);
        let want = lines(&backward);
        assert_eq!(kernels(&got), kernels(&want), "{name}: attention backward");
        let ids: Vec<u32> = (0..300).map(|i| i * 7 % 50).collect();
        let (ids, dy) = (Tensor::from_slice(&gpu, &ids, [300]), normal(&gpu, &[300, 8]));
        let got = seen(&gpu, &["embedding"], || dy.index_sum(0, &ids, 50));
        // The plan does not know how many rows of the table are used.
        assert_eq!(
            kernels(&got),
            kernels(&lines(&embedding_sum::plan(&class, [50, 8, 300]))),
            "{name}: embedding"
        );
    }
}

#[test]
fn a_class_is_named_by_options_and_unknown_ones_are_refused() {
    let class = of_class("Integrated").class().clone();
    assert_eq!((class.name, class.width), ("integrated", 8));
    // The class changes only choices. The properties of the adapter stay.
    assert_eq!(class.lanes, gpu().class().lanes);
    let options = Options::default().device(Some("mainframe".into()));
    let said = Gpu::open_with(options).expect_err("no such class").to_string();
    assert!(said.contains("'mainframe' is no class of devices"), "{said}");
    assert!(said.contains("there are auto, h200, "), "{said}");
}

/// Rows at different depths or layers take one product, whose parts are added up together with what differs.
#[test]
fn rows_that_share_a_matrix_take_two_dispatches() {
    let gpu = of_class("h200");
    let (x, w) = (normal(&gpu, &[32, 768]), tied(&normal(&gpu, &[768, 768])));
    let lora = DepthLora::new(&normal(&gpu, &[3, 16, 768]), &normal(&gpu, &[3, 768, 16]), 0.5);
    let rows = Tensor::from_slice(&gpu, &(0..32).map(|i| i % 3).collect::<Vec<u32>>(), [32]);
    let dictionary = Dictionary::new(&normal(&gpu, &[4, 768, 768]), &normal(&gpu, &[3, 4]));
    let depths = || no_grad(|| lora.linear(&x, &w, &rows));
    let layers = || no_grad(|| dictionary.mixed(&x, &rows));
    for work in [&depths as &dyn Fn() -> Tensor, &layers] {
        let passes = gpu.planned(|| work().evaluate()).expect("no fault");
        let lines: Vec<String> = passes.iter().map(Pass::to_string).collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
    }
}

#[test]
fn what_would_take_too_long_in_one_dispatch_is_cut() {
    // A file of measurements says that the device makes only ten million operations per second.
    let scratch = Folder::new("slow");
    let open = || {
        let (cache, device) = (Some(scratch.to_path_buf()), Some("auto".into()));
        Gpu::open_with(Options::default().cache(cache).device(device).tuning(Some(Tuning::Read)))
            .expect("an adapter")
    };
    let file = open().choices_file().expect("the folder was given").to_path_buf();
    open().save_choices().expect("a folder of the test");
    let head = std::fs::read_to_string(&file).expect("saved");
    std::fs::write(&file, format!("{head}device flops_s = 10000000\n")).expect("a folder of the test");
    let slow = open();
    assert_eq!(slow.class().flops_s, 1e7);
    let both = |work: &dyn Fn(&Gpu) -> Tensor| {
        let [want, got] = [gpu(), &slow].map(|gpu| work(gpu).to_vec::<f32>().expect("no fault"));
        for (i, (want, got)) in want.iter().zip(&got).enumerate() {
            assert!((want - got).abs() <= 1e-4 * want.abs().max(1.0), "element {i}: {got}, not {want}");
        }
    };
    let launches = |word: &str, work: &dyn Fn(&Gpu) -> Tensor| {
        let passes = slow.planned(|| work(&slow).evaluate()).expect("no fault");
        let named = passes.iter().filter(|pass| pass.source.name().starts_with(word));
        let most = named.clone().map(|pass| pass.flops).fold(0.0, f64::max);
        (named.count(), most)
    };
    let product = |gpu: &Gpu| normal(gpu, &[1000, 64]).matmul(&normal(gpu, &[64, 300]));
    both(&product);
    let (count, most) = launches("matmul", &product);
    assert!(count >= 4 && most <= 1.3e7, "{count} launches of up to {most} operations");
    // Batches that share an operand, whose halves begin at offsets which not every adapter can bind.
    let batches = |gpu: &Gpu| normal(gpu, &[70, 3, 15, 64]).matmul(&normal(gpu, &[3, 64, 25]));
    both(&batches);
    assert!(launches("matmul", &batches).0 >= 2);
    // Parts of a long inner axis, of rows from a list.
    let gathered = |gpu: &Gpu| {
        let weight = Tied::new(&normal(gpu, &[64, 4096])).shared();
        let rows = Tensor::from_slice(gpu, &(0..40).rev().collect::<Vec<u32>>(), [40]);
        normal(gpu, &[40, 4096]).linear_gathered(&rows, &weight)
    };
    both(&gathered);
    let (count, most) = launches("matmul", &gathered);
    assert!(count >= 4 && most <= 6e6, "{count} launches of up to {most} operations");
    // With a bias, a residual and rows from a list.
    let linear = |gpu: &Gpu| {
        let weight = Tied::new(&normal(gpu, &[64, 128])).shared();
        let (bias, residual) = (normal(gpu, &[64]), normal(gpu, &[8, 125, 64]));
        let rows: Vec<u32> = (0..1000).rev().collect();
        let rows = Tensor::from_slice(gpu, &rows, [1000]);
        let (x, tokens) = (normal(gpu, &[1000, 128]), normal(gpu, &[8, 125, 128]));
        let epilogue = Epilogue::default().bias(Some(&bias)).residual(Some(&residual));
        let y = tokens.linear(&weight, epilogue).reshape([1000, 64]);
        let gate = normal(gpu, &[1000]);
        y.add_linear_scattered(&x, &rows, &gate, &weight).add(&x.linear_gathered(&rows, &weight))
    };
    both(&linear);
    let attention = |gpu: &Gpu| {
        let [q, k, v] = [4, 2, 2].map(|heads| normal(gpu, &[3, heads, 96, 32]).requires_grad());
        let mask = Mask::Additive(normal(gpu, &[4, 96, 96]));
        let y = q.attention(&k, &v, &mask);
        let grads = y.sum_all().backward().expect("no fault");
        let all = [&q, &k, &v].map(|leaf| grads.get(leaf).expect("a gradient").reshape([leaf.count()]));
        Tensor::concat(&[&y.reshape([y.count()]), &all[0], &all[1], &all[2]], 0)
    };
    both(&attention);
    let (count, most) = launches("attention", &attention);
    assert!(count >= 20 && most <= 6e6, "{count} launches of up to {most} operations");
    // Four million operations each take nearly half a second on this device, longer than a submit should take.
    let x = normal(&slow, &[128, 128]);
    let compiled = |gpu: &Gpu, x: &Tensor| {
        x.matmul(x).evaluate();
        gpu.flush().unwrap();
    };
    compiled(&slow, &x);
    let before = slow.submits();
    (0..20).for_each(|_| x.matmul(&x).evaluate());
    assert!(slow.submits() - before >= 19, "{} submits for 20 products", slow.submits() - before);
    let quick = quiet();
    let y = normal(&quick, &[64, 64]);
    compiled(&quick, &y);
    let before = quick.submits();
    (0..20).for_each(|_| y.matmul(&y).evaluate());
    assert!(quick.submits() - before <= 1, "{} submits for 20 short products", quick.submits() - before);
}

/// Heads that are cut out of one product, and the result that is joined again, are not copied. Nor are those of `rope`.
#[test]
fn heads_are_read_where_they_lie() {
    for name in ["h200", "cpu"] {
        let gpu = of_class(name);
        let x = normal(&gpu, &[2, 40, 3 * 4 * 32]);
        let rope = Rope::new(&gpu, 40, 32, 10_000.0, Pairing::Halves);
        let head = |part: usize| {
            let all = x.reshape([2, 40, 12, 32]);
            all.slice(2, 4 * part..4 * part + 4).permute([0, 2, 1, 3])
        };
        let join = |y: Tensor| y.permute([0, 2, 1, 3]).reshape([2, 40, 128]);
        let passes = gpu.planned(|| join(head(0).attention(&head(1), &head(2), &Mask::Causal)).evaluate());
        let passes = passes.expect("no fault");
        assert!(passes.iter().all(|pass| pass.to_string().starts_with("attention")), "{passes:?}");
        let whole = normal(&gpu, &[2, 40, 128]).reshape([2, 40, 4, 32]).permute([0, 2, 1, 3]);
        let passes = gpu.planned(|| join(whole.rope(&rope, 0)).evaluate()).expect("no fault");
        assert_eq!(passes.len(), 1, "{passes:?}");
    }
}

#[test]
fn a_plan_changes_no_values() {
    let gpu = own();
    let [a, b, dy] = [3, 4, 5].map(|seed| {
        let mut data = vec![0.0; 96];
        Rng::new(seed).fill_normal(&mut data);
        Tensor::from_slice(&gpu, &data, [8, 12])
    });
    // The tape saves the silu, which is still pending.
    let graph = || {
        let [a, b] = [&a, &b].map(Tensor::requires_grad);
        (a.silu().mul(&b), b)
    };
    let gradient = |y: &Tensor, leaf: &Tensor| {
        y.backward_with_retain_graph(&dy).expect("no fault").get(leaf).expect("a gradient").clone()
    };
    let (y, leaf) = graph();
    let want: Vec<f32> = gradient(&y, &leaf).to_vec::<f32>().unwrap();
    assert!(want.iter().any(|&x| x.abs() > 0.1), "{want:?}");
    assert_eq!(gradient(&y, &leaf).to_vec::<f32>().unwrap(), want, "a second time");

    let (y, leaf) = graph();
    let mut planned = None;
    let mut plan =
        || gpu.only_planned(|| planned = Some(no_grad(|| gradient(&y, &leaf).softmax(-1)))).unwrap();
    let [first, second] = [plan(), plan()];
    assert!(!first.is_empty() && first == second, "{first:?}, then {second:?}");
    let error = planned.unwrap().to_vec::<f32>().unwrap_err().to_string();
    assert!(error.contains("only planned"), "{error}");
    assert_eq!(gradient(&y, &leaf).to_vec::<f32>().unwrap(), want, "after a plan");
    assert_eq!(y.to_vec::<f32>().unwrap(), graph().0.to_vec::<f32>().unwrap());
}

#[test]
fn a_plan_trains_nothing_and_what_the_host_writes_is_written() {
    let gpu = own();
    let x = Tensor::from_slice(&gpu, &[1.0, -2.0, 3.0, 0.5], [4]);
    let leaf = |scale| x.scale(scale).requires_grad();
    let w = leaf(2.0);
    let mut adam = AdamW::new(&gpu, vec![Group::new([("w", &w)])], AdamWConfig::default()).unwrap();
    let start = w.to_vec::<f32>().unwrap();
    let state = adam.state_dict().unwrap();
    // It is pending while the plan steps the optimizer, replays a step and restores a state.
    let before = w.detach().affine(1.0, 1.0);
    let step = |adam: &mut AdamW| {
        let grads = w.mul(&w).sum_all().backward().unwrap();
        adam.step(&grads, 0.1).unwrap();
    };
    let mut replayed = Step::record(&gpu, &[&x], |x| Ok(vec![x[0].scale(3.0)])).unwrap();
    let passes = gpu
        .only_planned(|| {
            step(&mut adam);
            replayed.run(&[&x.neg()]).unwrap();
            adam.load_state(7, &state).unwrap();
        })
        .unwrap();
    assert!(passes.iter().any(|pass| pass.op.starts_with("adam")), "{passes:?}");
    assert_eq!(w.to_vec::<f32>().unwrap(), start);
    assert_eq!(adam.steps(), 7, "the host loaded a state, and the planned step does not count");
    assert_eq!(replayed.outputs()[0].to_vec::<f32>().unwrap(), [3.0, -6.0, 9.0, 1.5]);
    step(&mut adam);
    assert_ne!(w.to_vec::<f32>().unwrap(), start);
    let want: Vec<f32> = start.iter().map(|w| w + 1.0).collect();
    assert_eq!(before.to_vec::<f32>().unwrap(), want);
    // An optimizer would take the parameters into memory that is never filled.
    let other = leaf(3.0);
    let mut made = None;
    gpu.only_planned(|| {
        made = Some(AdamW::new(&gpu, vec![Group::new([("w", &other)])], AdamWConfig::default()).map(drop));
    })
    .unwrap();
    assert!(made.unwrap().unwrap_err().to_string().contains("only planned"));
    assert_eq!(other.to_vec::<f32>().unwrap(), [3.0, -6.0, 9.0, 1.5]);
}

#[test]
fn plans_may_hold_plans() {
    let gpu = own();
    let x = normal(&gpu, &[4, 4]);
    let passes = gpu
        .only_planned(|| {
            let inner = gpu.only_planned(|| x.softmax(-1).evaluate()).unwrap();
            assert_eq!(inner.len(), 1);
            x.sum(1).evaluate();
        })
        .unwrap();
    assert_eq!(passes.len(), 1, "{passes:?}");
    // What a plan inside runs would read what was never computed.
    let mut kept = None;
    gpu.only_planned(|| {
        let y = x.sum(1);
        drop(gpu.planned(|| kept = Some(y.softmax(-1))));
    })
    .unwrap();
    assert!(kept.unwrap().to_vec::<f32>().unwrap_err().to_string().contains("only planned"));
    // The result of a step that was recorded in a plan has no values either.
    let mut recorded = None;
    gpu.only_planned(|| recorded = Some(Step::record(&gpu, &[&x], |x| Ok(vec![x[0].softmax(-1)])).unwrap()))
        .unwrap();
    let outputs = recorded.unwrap().outputs()[0].to_vec::<f32>();
    assert!(outputs.unwrap_err().to_string().contains("only planned"));
    assert!(gpu.planned(|| x.sum(1).evaluate()).unwrap().len() == 1);
}
