//! The kind obeys the law of sharing on kernels for CPUs and for GPUs, agrees with a reference, and is trained, saved and opened in
//! a model, through the public interface alone.

use kronecker::{Kronecker, Recipes};
use std::error::Error;
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::{Epilogue, Parameters};
use tiebeam::ops::case::{Array, Case, Input};
use tiebeam::optim::{AdamW, AdamWConfig, Group};
use tiebeam::share::{Site, check_law};
use tiebeam::{Gpu, Options, Rng, Tensor};

type Outcome = Result<(), Box<dyn Error>>;

#[test]
fn it_obeys_the_law() -> Outcome {
    for class in ["cpu", "discrete"] {
        let gpu = Gpu::open_with(Options::default().device(Some(class.into())))?;
        // Whole vectors of four, and edges.
        for ([out, inner], block) in
            [([8, 12], [4, 2]), ([6, 12], [3, 4]), ([15, 14], [5, 7]), ([3, 9], [1, 3])]
        {
            let site = Kronecker::random(&gpu, [out, inner], block, 1.0, &mut Rng::new(1))?.shared();
            check_law(&site)?;
        }
    }
    Ok(())
}

#[test]
fn it_agrees_with_a_reference() -> Outcome {
    let gpu = Gpu::open()?;
    for rows in [3, 70] {
        let inputs = vec![Input::normal([rows, 6]), Input::normal([3, 2]), Input::normal([2, 3])];
        let forward = |x: &[Tensor]| {
            let site = Kronecker::new(&x[1], &x[2]).shared();
            x[0].linear(&site, Epilogue::default())
        };
        let reference = |x: &[Array]| {
            let w = |i: usize, j: usize| x[1].data[i / 2 * 2 + j / 3] * x[2].data[i % 2 * 3 + j % 3];
            let term = |at: usize, j: usize| x[0].data[at / 6 * 6 + j] * w(at % 6, j);
            Array::from_fn([x[0].shape[0], 6], |at| (0..6).map(|j| term(at, j)).sum())
        };
        Case::new(format!("{rows} rows"), inputs, forward, reference).ulps(16.0, 32.0).check(&gpu)?;
    }
    Ok(())
}

#[test]
fn it_is_trained_saved_and_opened_in_a_model() -> Outcome {
    Recipes::register();
    let gpu = Gpu::open()?;
    let config = LmConfig::small().vocab(11).width(16).heads(2).kv_heads(2).hidden(32).context(8).depth(2);
    let config = config.sharing(Sharing::named("kronecker 4")?);
    let model = Lm::new(&gpu, config, &mut Rng::new(1));
    let all = Parameters::of(&model);
    // q of a depth stores two factors of 4 x 4 in place of 16 x 16.
    assert_eq!(model.blocks[0].attention.q.weight.leaves().iter().map(Tensor::count).sum::<usize>(), 32);
    let group = Group::new(all.trainable());
    let mut adamw = AdamW::new(&gpu, vec![group], AdamWConfig::default())?;
    let tokens: Vec<u32> = (0..16).map(|i| i * 7 % 11).collect();
    let tokens = Tensor::from_slice(&gpu, &tokens, [2, 8]);
    let loss = || model.loss(&tokens, &tokens);
    let first = loss().item()?;
    for _ in 0..30 {
        let grads = loss().backward()?;
        assert_eq!(grads.len(), all.named().len(), "every leaf has a gradient");
        adamw.step(&grads, 0.02)?;
    }
    let last = loss().item()?;
    assert!(last < first / 4.0, "{last} after {first}");

    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    model.save(&path)?;

    let opened = Lm::open(&gpu, &path)?;
    assert_eq!(opened.config.sharing.text(), "kronecker 4");
    assert_eq!(opened.loss(&tokens, &tokens).item()?, last);
    Ok(())
}

#[test]
fn sizes_that_do_not_fit_are_told() -> Outcome {
    Recipes::register();
    let gpu = Gpu::open()?;
    let told = Kronecker::random(&gpu, [6, 8], [4, 4], 1.0, &mut Rng::new(1)).map(drop).unwrap_err();
    assert!(told.to_string().contains("blocks of 4 x 4 do not divide [6, 8]"), "{told}");
    let told = Sharing::named("kronecker").unwrap_err();
    assert!(told.to_string().contains("write `kronecker 8`"), "{told}");
    Ok(())
}
