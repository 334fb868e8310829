//! Running averages, which are changed in place.

use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::tensor::{Tensor, same_gpu};

const OP: &str = "running";

/// Moves running averages towards new values, in place: `y += rate (x - y)` for each pair `(y, x)`. Elements of x that are not
/// finite are left out. All are changed or none. It is recorded like an op, so a replayed step moves them too.
///
/// # Errors
/// When one carries an error, or the device has failed. Then none changes.
///
/// # Panics
/// When two tensors of a pair differ in shape or are not f32, or `y` is a view.
#[track_caller]
pub(crate) fn move_towards(pairs: &[(&Tensor, &Tensor)], rate: f32) -> Result<()> {
    let source = Source::file("running");
    let (mut changed, mut launches) = (Vec::new(), Vec::new());
    for (y, x) in pairs {
        same_gpu(OP, &[y, x]);
        let fits = x.shape() == y.shape() && [x, y].iter().all(|t| t.dtype() == DType::F32);
        assert!(
            fits && y.is_whole(),
            "{OP}: {} of {} towards {} of {}; an average is an f32 tensor with elements of its own",
            y.shape(),
            y.dtype(),
            x.shape(),
            x.dtype()
        );
        x.check()?;
        let (x, place) = (x.detach().contiguous(), y.place());
        let launch = Launch::new(OP, &source, "main", grid(y.count().div_ceil(64)));
        launches
            .push(launch.bind("x", &x).bind_mut("y", *y).set("count", y.count()).set("rate", rate).turns(0));
        changed.push(place.buffer);
    }
    match pairs.first() {
        Some((y, _)) => y.gpu().change(&changed, &launches),
        None => Ok(()),
    }
}
