//! The `adapters` family: Bone and MiSS by PEFT's layers, and mixtures of shards by their authors' formulas.
//! Formulas: `tests/vectors/adapters/README.md`.

use super::sharing::{integers, leaf, same, same_gradient, tensor};
use super::tying::{need, open};
use crate::support::gpu;
use std::path::Path;
use std::sync::Arc;
use tiebeam::share::{Bone, Miss, Reduced, ShardConfig, ShardPool, Site};
use tiebeam::store::File;
use tiebeam::{Rng, Tensor};

pub const FILES: &[(&str, super::Check)] = &[("bone", bone), ("miss", miss), ("mos", mos)];

/// The names of a file's cases, which its tensors begin with.
fn cases(file: &File) -> Vec<String> {
    need::<String>(file, "cases").split(' ').map(String::from).collect()
}

/// Tests sites of a weight and one more leaf: the weight itself, a product, and its gradients by both adjoints.
fn one_leaf(path: &Path, name: &str, make: fn(&Tensor, &Tensor) -> Arc<dyn Site>) {
    let file = open(path);
    for case in cases(&file) {
        let of = |what: &str| format!("{case}.{what}");
        let [x, w, part] = ["x", "w", name].map(|leaf_name| leaf(&file, &of(&format!("param.{leaf_name}"))));
        let site = make(&w, &part);
        same(&file, &of("out.w"), &site.expand());
        for site in [site.clone(), Reduced(site).shared()] {
            let y = x.linear(&site, Default::default());
            same(&file, &of("out.y"), &y);
            let grads = y.mul(&tensor(&file, &of("in.gout"))).sum_all().backward().unwrap();
            same_gradient(&file, &of("grad.x"), &grads, &x);
            same_gradient(&file, &of("grad.w"), &grads, &w);
            same_gradient(&file, &of(&format!("grad.{name}")), &grads, &part);
        }
    }
}

pub fn bone(path: &Path) {
    one_leaf(path, "blocks", |w, blocks| Bone::new(w, blocks).shared());
}

/// Tests both forms, whose last block is cut off in some cases.
pub fn miss(path: &Path) {
    one_leaf(path, "shard", |w, shard| Miss::new(w, shard).shared());
}

/// Tests the parts of all layers of one projection, whose gradients meet in the pools, and that our pools are laid out as theirs.
pub fn mos(path: &Path) {
    let file = open(path);
    for case in cases(&file) {
        let of = |what: &str| format!("{case}.{what}");
        let [rank, budget, private, shards] =
            ["rank", "budget", "private", "shards"].map(|setting| need::<usize>(&file, &of(setting)));
        let config = ShardConfig::new(rank, budget).shards(shards).private(private);
        let config = config.alpha(need(&file, &of("alpha")));
        let [x, w, pool_a, pool_b] =
            ["x", "w", "pool_a", "pool_b"].map(|name| leaf(&file, &of(&format!("param.{name}"))));
        let [layers, out, inner] = [0, 1, 2].map(|axis| w.shape()[axis]);
        let [index_a, index_b] = ["index_a", "index_b"].map(|name| {
            let all = integers(&file, &of(name));
            all.chunks(all.len() / layers).map(<[u32]>::to_vec).collect::<Vec<_>>()
        });
        // What the settings make has the file's sizes and private shards, and public ones of which a layer has none twice.
        let made = ShardPool::new(gpu(), layers, [out, inner], config, &mut Rng::new(1)).unwrap();
        assert_eq!((made.pool_a.shape(), made.pool_b.shape()), (pool_a.shape(), pool_b.shape()), "{case}");
        for (made, given) in [(&made.index_a, &index_a), (&made.index_b, &index_b)] {
            for (made, given) in made.iter().zip(given) {
                let (public, own) = made.split_at((rank - private) * shards);
                assert_eq!(own, &given[public.len()..], "{case}");
                let mut public = public.to_vec();
                public.sort_unstable();
                public.dedup();
                assert_eq!(public.len(), (rank - private) * shards, "{case}");
                let all = (budget - private) * layers * shards;
                assert!(public.iter().all(|&i| (i as usize) < all), "{case}");
            }
        }

        let (pools, indices) = ([&pool_a, &pool_b].map(Tensor::clone), [index_a, index_b]);
        let ([pool_a, pool_b], [index_a, index_b]) = (pools, indices);
        let pool = ShardPool { pool_a, pool_b, index_a, index_b, ..made };
        let layer = |k: usize| pool.site(k, &w.slice(0, k..k + 1).reshape([out, inner]));
        let stack = |all: Vec<Tensor>| Tensor::stack(&all.iter().collect::<Vec<_>>(), 0);
        same(&file, &of("out.w"), &stack((0..layers).map(|k| layer(k).expand()).collect()));
        for reduced in [false, true] {
            let site = |k: usize| if reduced { Reduced(layer(k)).shared() } else { layer(k) };
            let y = stack((0..layers).map(|k| x.linear(&site(k), Default::default())).collect());
            same(&file, &of("out.y"), &y);
            let grads = y.mul(&tensor(&file, &of("in.gout"))).sum_all().backward().unwrap();
            for (name, leaf) in [("x", &x), ("w", &w), ("pool_a", &pool.pool_a), ("pool_b", &pool.pool_b)] {
                same_gradient(&file, &of(&format!("grad.{name}")), &grads, leaf);
            }
        }
    }
}
