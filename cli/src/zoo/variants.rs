//! The models of the zoo: every way to share weights, and beside each the baselines that its paper names.

use tiebeam::models::adapter::AdapterKind;
use tiebeam::models::lm::{ExpertsConfig, LmConfig};
use tiebeam::models::sharing::Sharing;
use tiebeam::share::ShardConfig;

/// A model, or what is done with one.
pub struct Variant {
    pub name: String,
    /// The variant that it is compared with.
    pub beside: &'static str,
    /// What it is, in a few words.
    pub what: String,
    pub kind: Kind,
}

pub enum Kind {
    /// Trained from scratch.
    Model(Box<LmConfig>),
    /// Trained with tied stages for the whole run, then untied and trained for a few steps more (SWS).
    Expanded(Box<LmConfig>),
    /// Trained from scratch for as few steps.
    Short(Box<LmConfig>),
    /// The plain model, trained on the text, then adapted to another one. `None` trains all of it.
    Adapted(Option<AdapterKind>),
}

impl Variant {
    /// Whether it brings the plain model to the other text.
    pub fn is_adapted(&self) -> bool {
        matches!(self.kind, Kind::Adapted(_))
    }

    /// Whether its run has another number of steps than most.
    pub fn is_short(&self) -> bool {
        matches!(self.kind, Kind::Short(_) | Kind::Expanded(_))
    }
}

/// Steps of what is trained a little: a sixth of a run.
pub fn few(steps: u64) -> u64 {
    steps.div_ceil(6)
}

/// Numbers that a plain model stores, from its settings: what a store can stand for; norms and positions.
fn stored(c: &LmConfig) -> [usize; 2] {
    let block: usize = c.linears().iter().map(|(_, [out, inner])| out * inner).sum();
    let norms = 2 * c.width * c.depth + c.width;
    [c.vocab * c.width + block * c.depth, norms + c.context * c.width]
}

/// The narrower plain model that is nearest in size to one whose weights are read from a store of `1 / factor` as many numbers.
fn narrow(plain: &LmConfig, factor: usize) -> LmConfig {
    let of = |width: usize| plain.clone().width(width).hidden(4 * width);
    let [weights, rest] = stored(plain);
    let target = weights / factor + rest;
    let widths = (1..).map(|i| 2 * plain.heads * i).take_while(|width| *width <= plain.width);
    let nearest = widths.min_by_key(|&width| stored(&of(width)).iter().sum::<usize>().abs_diff(target));
    of(nearest.unwrap_or(2 * plain.heads))
}

/// All variants on the sizes of a plain model.
pub fn all(plain: &LmConfig) -> Vec<Variant> {
    let (depth, width, third) = (plain.depth, plain.width, (plain.depth / 3).max(1));
    let mut all = Vec::new();
    let mut put = |name: &str, beside: &'static str, what: &str, config: LmConfig| {
        let kind = Kind::Model(Box::new(config));
        all.push(Variant { name: name.into(), beside, what: what.into(), kind });
    };
    let shared = |text: &str| {
        plain
            .clone()
            .sharing(Sharing::named(text).unwrap_or_else(|error| panic!("the zoo's `{text}`: {error}")))
    };
    put("none", "none", "nothing is shared", plain.clone());
    // MASA and the baselines of its table.
    let kv = (plain.heads / 2).max(1);
    put("gqa", "none", "half as many heads of keys and values", plain.clone().kv_heads(kv));
    put(
        "masa-qkv",
        "none",
        "q, k and v from dictionaries",
        shared(&format!("dictionary {third} output false")),
    );
    put(
        "masa-qkvo",
        "none",
        "q, k, v and o from dictionaries",
        shared(&format!("dictionary {third} output true")),
    );
    let net = format!("dictionary {third} output true net");
    put("masa-net", "masa-qkvo", "with coefficients of a network", shared(&net));
    let low = (width / 6).max(1);
    put(
        "low-rank",
        "masa-qkvo",
        "attention of low rank, as large as masa-qkvo",
        shared(&format!("low-rank {low}")),
    );
    let repeat = format!("q k v o: cycle {third} rank 0; none");
    put("repeat", "masa-qkvo", "attention repeated all over, as large", shared(&repeat));
    let sequential = format!("q k v o: fold {}; none", depth.div_ceil(third));
    put("sequential", "masa-qkvo", "attention shared by neighbours, as large", shared(&sequential));
    // Recursion.
    put("tied", "none", "one block, norms of each depth's own", shared("tied"));
    put("tied-norms", "tied", "one block, norms too", shared("tied").shared_norms(true));
    for rank in [(width / 32).max(1), (width / 8).max(1)] {
        let text = format!("tied-lora rank {rank} scale 1");
        put(
            &format!("relaxed-{rank}"),
            "tied",
            "one block, low-rank parts of each depth's own",
            shared(&text),
        );
    }
    put("cycle", "none", "blocks in turn", shared(&format!("cycle {third} rank 0")));
    put("fold", "none", "pairs of neighbours share a block (FoldGPT)", shared("fold 2"));
    let ends = plain.clone().ends([1, 1]).sharing(Sharing::tied());
    put("ends", "tied", "one block between a first and a last of their own", ends);
    // WideNet.
    let experts = ExpertsConfig { count: 4, top: 2, capacity: 1.25, balance: 0.01 };
    let wide = shared("tied").experts(Some(experts));
    put("widenet", "tied", "one attention, 4 experts, norms of each depth's own", wide.clone());
    put("widenet-norms", "widenet", "with one pair of norms", wide.shared_norms(true));
    // Hashed weights beside narrower models of as many numbers.
    for factor in [2usize, 4, 8, 16] {
        let name: &'static str =
            ["narrow-2", "narrow-4", "narrow-8", "narrow-16"][factor.ilog2() as usize - 1];
        let what = format!("all weights from one store, 1/{factor} as large");
        put(&format!("hashed-{factor}"), name, &what, shared(&format!("hashed {factor}")));
        put(name, "none", &format!("a narrower model, 1/{factor} as large"), narrow(plain, factor));
    }
    put("roast-4", "hashed-4", "the same by tiles (ROAST)", shared("hashed 4 roast"));
    // Stages, and what they are for.
    let sizes: Vec<String> = stages(depth).iter().map(ToString::to_string).collect();
    let staged = shared(&format!("stages {}", sizes.join(" ")));
    put("stages", "none", "stages of unequal size share a block (SWS)", staged.clone());
    let own =
        |name: &str, beside, what: &str, kind| Variant { name: name.into(), beside, what: what.into(), kind };
    all.push(own(
        "short",
        "none",
        "nothing shared, a sixth of the steps",
        Kind::Short(Box::new(plain.clone())),
    ));
    all.push(own(
        "expanded",
        "short",
        "stages untied, then a sixth of the steps",
        Kind::Expanded(Box::new(staged)),
    ));
    all
}

/// Adapters of a plain model to another text.
pub fn adapted() -> Vec<Variant> {
    let lora = |rank| AdapterKind::Lora { rank, alpha: 2.0 * rank as f32, rslora: false };
    let own = |name: &str, beside, what: &str, kind| Variant {
        name: name.into(),
        beside,
        what: what.into(),
        kind: Kind::Adapted(kind),
    };
    let mos = AdapterKind::Mos(ShardConfig::new(4, 1).shards(2));
    vec![
        own("full", "full", "all weights trained on the other text", None),
        own("lora-8", "full", "LoRA of rank 8", Some(lora(8))),
        own("lora-1", "lora-8", "LoRA of rank 1, as large as mos-4", Some(lora(1))),
        own("mos-4", "lora-1", "a mixture of shards, an eighth of lora-8", Some(mos)),
        own("miss-8", "lora-8", "MiSS of rank 8", Some(AdapterKind::Miss { rank: 8 })),
        own("bone-8", "lora-8", "Bone with blocks of 8", Some(AdapterKind::Bone { rank: 8 })),
    ]
}

/// Sizes of five stages, or fewer of a shallow model, of which the middle ones are larger.
fn stages(depth: usize) -> Vec<usize> {
    let count = 5.min((2 * depth / 3).max(1));
    let mut sizes = vec![depth / count; count];
    let middle = count / 2;
    // What is left goes to the middle, then to its neighbours.
    for i in 0..depth % count {
        let at = if i.is_multiple_of(2) { middle + i.div_ceil(2) } else { middle - i.div_ceil(2) };
        sizes[at.min(count - 1)] += 1;
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_as_in_the_paper() {
        assert_eq!(stages(16), [3, 3, 4, 3, 3]);
        assert_eq!(stages(6), [1, 2, 2, 1]);
        assert_eq!(
            (1..40).map(|depth| stages(depth).iter().sum::<usize>()).collect::<Vec<_>>(),
            (1..40).collect::<Vec<_>>()
        );
    }

    #[test]
    fn narrow_models_are_as_large_as_hashed_ones() {
        let plain =
            LmConfig::small().width(96).hidden(384).heads(3).kv_heads(3).depth(6).context(64).vocab(256);
        let sizes = [2, 4, 8, 16].map(|factor| stored(&narrow(&plain, factor)).iter().sum::<usize>());
        assert_eq!(sizes, [335_610, 181_872, 105_300, 49_464]);
    }

    #[test]
    fn every_variant_stands_beside_one_that_is_there() {
        for variants in [all(&LmConfig::small().sharing(Sharing::none())), adapted()] {
            for variant in &variants {
                assert!(variants.iter().any(|other| other.name == variant.beside), "{}", variant.name);
                assert_eq!(variants.iter().filter(|other| other.name == variant.name).count(), 1);
            }
        }
    }
}
