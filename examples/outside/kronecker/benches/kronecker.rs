//! Products with Kronecker weights beside those with stored ones: `cargo bench --package kronecker`.

use kronecker::Kronecker;
use tiebeam::share::Site;
use tiebeam::{Gpu, Rng};

fn main() -> tiebeam::Result<()> {
    let gpu = Gpu::open()?;
    let size = if gpu.class().is_cpu() { 1024 } else { 4096 };
    let factors = Kronecker::random(&gpu, [size, size], [32, 32], 0.02, &mut Rng::new(1))?;
    let site = factors.shared();
    print!("{}", tiebeam::bench::outside::site(&gpu, &site, &[1, 16, 512])?);
    Ok(())
}
