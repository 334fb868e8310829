//! Adapters on frozen weights: what a model lists, saves and trains of them.

use crate::support::folder::Folder;
use crate::support::{download, gpu};
use std::sync::Arc;
use tiebeam::decode::{DepthBatch, Exit, Scheduling};
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::{Linear, Module, ModuleFile, module};
use tiebeam::optim::{Group, Sgd, SgdConfig};
use tiebeam::share::{Bone, LowRank, Miss, Packed, Packing, Scales, ShardConfig, ShardPool, Site, Tied};
use tiebeam::{Gpu, Rng, Tensor};

const SIZE: [usize; 2] = [8, 12];
const LAYERS: usize = 8;

struct Net(Vec<Linear>);

module!(Net { 0 => "" });

/// Frozen weights of all layers, in f32 or packed.
fn bases(gpu: &Gpu, are_packed: bool) -> Vec<Arc<dyn Site>> {
    let [out, inner] = SIZE;
    let base = |layer: usize| -> Arc<dyn Site> {
        if !are_packed {
            return Tied::new(&Tensor::randn(gpu, SIZE, &mut Rng::new(layer as u64))).shared();
        }
        let packing = Packing::new(4, 16, Scales::Affine).unwrap();
        let row = packing.row_words(inner);
        let mut words = vec![0; out * row];
        for (r, row) in words.chunks_exact_mut(row).enumerate() {
            let levels: Vec<u8> = (0..inner).map(|c| ((layer + r * 3 + c * 7) % 16) as u8).collect();
            packing.write_levels(&levels, row);
            packing.write_scale(row, inner, 0, [0.125, -1.0]);
        }
        Packed::new(gpu, packing, SIZE, &words).unwrap().shared()
    };
    (0..LAYERS).map(base).collect()
}

fn shards(bases: &[Arc<dyn Site>], config: ShardConfig, seed: u64) -> Net {
    let pool = ShardPool::new(gpu(), LAYERS, SIZE, config, &mut Rng::new(seed)).unwrap();
    Net(bases.iter().enumerate().map(|(k, base)| Linear::from_site(pool.over(k, base), None)).collect())
}

fn run(net: &Net) -> Tensor {
    let x = Tensor::randn(gpu(), [5, SIZE[1]], &mut Rng::new(99));
    let all: Vec<Tensor> = net.0.iter().map(|layer| layer.forward(&x)).collect();
    Tensor::stack(&all.iter().collect::<Vec<_>>(), 0)
}

/// Trains what is not frozen. B is 0 at first, so the first step changes nothing but B.
fn train(net: &Net) {
    let target = Tensor::randn(gpu(), [LAYERS, 5, SIZE[0]], &mut Rng::new(98));
    let group = Group::new(net.parameters().trainable());
    let mut sgd = Sgd::new(gpu(), vec![group], SgdConfig::default()).unwrap();
    for _ in 0..3 {
        let grads = run(net).sub(&target).square().sum_all().backward().unwrap();
        sgd.step(&grads, 0.001).unwrap();
    }
}

/// LoRA of rank 8, and an eighth of its parameters in shards for parts of rank 4.
#[test]
fn a_mixture_of_shards_has_the_parameters_of_its_budget() {
    let lora = |layer: usize| {
        let mut rng = Rng::new(layer as u64);
        let [a, b] = [[8, SIZE[1]], [SIZE[0], 8]].map(|s| Tensor::randn(gpu(), s, &mut rng).requires_grad());
        Linear::from_site(LowRank::over(&bases(gpu(), false)[layer], &a, &b, 1.0).shared(), None)
    };
    let trained = |net: &Net| net.parameters().trainable().iter().map(|(_, x)| x.count()).sum::<usize>();
    let net = shards(&bases(gpu(), false), ShardConfig::new(4, 1).shards(2), 1);
    assert_eq!(trained(&net), trained(&Net((0..LAYERS).map(lora).collect())) / 8);
}

#[test]
fn shards_are_listed_saved_and_trained_once_for_all_layers() {
    for are_packed in [false, true] {
        let bases = bases(gpu(), are_packed);
        let config = ShardConfig::new(4, 2).shards(4).private(1);
        let mut net = shards(&bases, config, 1);
        let names: Vec<String> = net.parameters().trainable().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["0.pool_a", "0.pool_b"]);
        let start = download(&run(&net));
        for (layer, base) in net.0.iter().zip(&bases) {
            assert_eq!(download(&layer.weight.expand()), download(&base.expand()), "B is 0");
        }
        train(&net);
        let trained = download(&run(&net));
        assert_ne!(trained, start);

        // A file has the indices, so a model of another seed becomes the same.
        let folder = Folder::new("shards");
        let path = folder.join("net.safetensors");
        net.save(&path).unwrap();
        let other = shards(&bases, config, 2);
        other.load(&path).unwrap();
        assert_eq!(download(&run(&other)), trained, "packed: {are_packed}");

        // Where nothing is trained, a part on a packed weight is multiplied beside it, and rounds in another order.
        net.freeze(|_| true);
        assert!(net.parameters().trainable().is_empty());
        let most = download(&run(&net)).iter().zip(&trained).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(if are_packed { most < 1e-5 } else { most == 0.0 }, "{most}");
    }
}

#[test]
fn pools_are_the_same_from_the_same_seed() {
    let make = |seed| {
        let config = ShardConfig::new(5, 2).shards(2).private(1);
        ShardPool::new(gpu(), 4, SIZE, config, &mut Rng::new(seed)).unwrap()
    };
    let [one, two, three] = [1, 1, 2].map(make);
    assert_eq!((&one.index_a, &one.index_b), (&two.index_a, &two.index_b));
    assert_eq!(download(&one.pool_a), download(&two.pool_a));
    assert_ne!(one.index_a, three.index_a);
    // A and B are drawn apart, except for the private shards, which are the last.
    assert_ne!(one.index_a[0][..8], one.index_b[0][..8]);
    assert_eq!(one.index_a[3][8..], [8 + 6, 8 + 7]);
    assert!(download(&one.pool_a).iter().all(|x| x.abs() <= (1.0 / 12f64).sqrt()));
}

#[test]
fn wrong_settings_of_shards_are_told() {
    let told = |config: ShardConfig| {
        let made = ShardPool::new(gpu(), 2, SIZE, config, &mut Rng::new(1));
        made.err().expect("an error").to_string()
    };
    for (config, part) in [
        (ShardConfig::new(2, 1).shards(3), "do not divide both sides"),
        (ShardConfig::new(4, 1).private(2), "exceed the budget 1"),
        (ShardConfig::new(5, 2), "draws 5 public vectors of 4"),
        (ShardConfig::new(0, 2), "none of these may be 0"),
    ] {
        assert!(told(config).contains(part), "{}", told(config));
    }
}

#[test]
fn bone_and_miss_list_their_leaves_and_begin_with_the_weight() {
    let weight = Tensor::randn(gpu(), SIZE, &mut Rng::new(1));
    let blocks = Tensor::zeros(gpu(), [2, 4, 4]).requires_grad();
    let shard = Tensor::zeros(gpu(), [5, 8]).requires_grad();
    for (site, name) in
        [(Bone::new(&weight, &blocks).shared(), "blocks"), (Miss::new(&weight, &shard).shared(), "shard")]
    {
        assert_eq!(download(&site.expand()), download(&weight), "{name}");
        let all = Net(vec![Linear::from_site(site, None)]).parameters();
        let names: Vec<&str> = all.named().iter().map(|(name, _)| name.rsplit('.').next().unwrap()).collect();
        assert_eq!(names, ["weight", name]);
        assert_eq!(all.trainable().len(), 1, "the weight is frozen");
    }
    let packed = bases(gpu(), true).remove(0);
    let refused = Bone::over(&packed, &blocks).err().expect("an error").to_string();
    assert!(refused.contains("of the kind packed would be unpacked as a whole"), "{refused}");
}

/// Shards over one matrix look like low-rank parts of it, by their leaves and by how they are read.
#[test]
fn shards_are_not_served_as_low_rank_parts() {
    let config = LmConfig::small().vocab(11).width(16).heads(2).kv_heads(2).hidden(24).context(8).depth(3);
    let mut model = Lm::new(gpu(), config.sharing(Sharing::tied()), &mut Rng::new(5));
    // As many shards as the rank, so that the pool has the shape of A.
    let pool = ShardPool::new(gpu(), 3, [16, 16], ShardConfig::new(3, 1), &mut Rng::new(1)).unwrap();
    for (k, block) in model.blocks.iter_mut().enumerate() {
        block.attention.q.weight = pool.over(k, &block.attention.q.weight);
    }
    let made = DepthBatch::new(&model, 2, Exit::Confidence(0.5), Scheduling::Continuous);
    let refused = made.err().expect("an error").to_string();
    assert!(refused.contains("must share one block"), "{refused}");
}
