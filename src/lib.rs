#![doc = include_str!("../docs/crate.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]
// rustdoc follows wgpu's types all the way down to see which are Send and Sync.
#![recursion_limit = "256"]

#[cfg(feature = "bench")]
pub mod bench;
#[cfg(feature = "capi")]
pub mod capi;
#[cfg(feature = "plot")]
pub mod chart;
pub mod data;
pub mod decode;
pub mod dtype;
pub mod error;
pub mod exit;
pub mod files;
pub mod geometry;
pub mod gpu;
pub mod language;
pub mod linalg;
pub mod merge;
pub mod models;
pub mod nn;
pub mod op;
pub mod ops;
pub mod optim;
pub mod precision;
pub mod quant;
pub mod ranks;
pub mod rng;
mod setters;
pub mod shape;
pub mod share;
pub mod step;
pub mod store;
pub mod tape;
pub mod tensor;
#[cfg(feature = "text")]
pub mod text;
pub mod train;

pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use gpu::{Feature, Gpu, Options};
pub use precision::{Precision, autocast};
pub use rng::Rng;
pub use shape::Shape;
pub use step::Step;
pub use tape::{Grads, checkpoint, no_grad};
pub use tensor::Tensor;

/// The programs in README and guide compile, and run where their pages say so.
#[cfg(doctest)]
mod pages {
    macro_rules! pages {
        ($($name:ident $path:literal)*) => { $( #[doc = include_str!($path)] struct $name; )* };
    }

    pages! {
        Readme "../README.md"
        CAndPython "../docs/c-and-python.md"
        Decoding "../docs/families/decoding.md"
        Depth "../docs/families/depth.md"
        Geometry "../docs/families/geometry.md"
        Language "../docs/families/language.md"
        Merging "../docs/families/merging.md"
        Pytorch "../docs/pytorch.md"
        Ranks "../docs/families/ranks.md"
        Reliability "../docs/reliability.md"
        Troubleshooting "../docs/troubleshooting.md"
        TutorialKind "../docs/tutorial/kind.md"
        TutorialModel "../docs/tutorial/model.md"
        TutorialOp "../docs/tutorial/op.md"
        TutorialSave "../docs/tutorial/save.md"
        TutorialTensors "../docs/tutorial/tensors.md"
        TutorialTied "../docs/tutorial/tied.md"
        TutorialTrain "../docs/tutorial/train.md"
    }
}
