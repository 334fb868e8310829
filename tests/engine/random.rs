//! Random fills on the device: the same bits as on the host, and the right statistics.

use crate::support::gpu;
use tiebeam::{Rng, Tensor};

/// Sizes around the block of 4 elements, the workgroup of 256, and several workgroups.
const SIZES: [usize; 8] = [1, 3, 4, 5, 255, 257, 1021, 100_003];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn fills_are_the_hosts_bits() {
    for seed in [0, 7, u64::MAX - 5] {
        for n in SIZES {
            let (mut device, mut host) = (Rng::new(seed), Rng::new(seed));
            // Each draw from a generator takes its next stream.
            for _ in 0..2 {
                let mut want = vec![0.0; n];
                host.fill_uniform(&mut want);
                let got: Vec<f32> = Tensor::rand(gpu(), [n], &mut device).to_vec().expect("rand");
                assert_eq!(bits(&got), bits(&want), "rand of {n}, seed {seed}");
                host.fill_normal(&mut want);
                let got: Vec<f32> = Tensor::randn(gpu(), [n], &mut device).to_vec().expect("randn");
                assert_eq!(bits(&got), bits(&want), "randn of {n}, seed {seed}");
            }
            assert_eq!(device.state(), host.state());
        }
    }
}

#[test]
fn streams_past_32_bits_reach_the_kernel() {
    let far = [3, (1 << 33) + 5];
    let (mut device, mut host) = (Rng::from_state(far), Rng::from_state(far));
    let mut want = vec![0.0; 300];
    host.fill_uniform(&mut want);
    let got: Vec<f32> = Tensor::rand(gpu(), [300], &mut device).to_vec().expect("rand");
    assert_eq!(bits(&got), bits(&want));
}

#[test]
fn a_second_device_has_its_own_table() {
    let draw = |gpu: &tiebeam::Gpu| -> Vec<f32> {
        Tensor::randn(gpu, [70], &mut Rng::new(5)).to_vec().expect("randn")
    };
    let want = bits(&draw(gpu()));
    for _ in 0..2 {
        let other = tiebeam::Gpu::open().expect("a second device");
        assert_eq!(bits(&draw(&other)), want);
    }
    assert_eq!(bits(&draw(gpu())), want);
}

#[test]
fn dropout_keeps_the_share_and_the_mean() {
    let n = 200_000;
    let mut rng = Rng::new(41);
    for p in [0.1f32, 0.5, 0.9] {
        let x = Tensor::ones(gpu(), [n]).requires_grad();
        let y = x.dropout(p, &mut rng);
        let values: Vec<f32> = y.to_vec().expect("dropout");
        let kept = values.iter().filter(|&&v| v != 0.0).count() as f64 / n as f64;
        let deviation = (p as f64 * (1.0 - p as f64) / n as f64).sqrt();
        assert!((kept - (1.0 - p as f64)).abs() < 5.0 * deviation, "rate {p}: kept {kept}");
        assert!(values.iter().all(|&v| v == 0.0 || v == 1.0 / (1.0 - p)));
        // For an input of ones the gradient equals the output, if backward draws the same mask again.
        let grads = y.sum_all().backward().expect("backward");
        assert_eq!(grads.get(&x).expect("gradient").to_vec::<f32>().expect("gradient"), values);
        // The next call draws another mask.
        let next: Vec<f32> = x.dropout(p, &mut rng).to_vec().expect("dropout");
        assert_ne!(next, values);
    }
}

#[test]
fn dropout_drops_what_is_not_finite() {
    let x = Tensor::full(gpu(), [4096], f32::INFINITY);
    let y: Vec<f32> = x.dropout(0.5, &mut Rng::new(1)).to_vec().expect("dropout");
    assert!(y.contains(&0.0) && y.iter().all(|&v| v == 0.0 || v == f32::INFINITY));
}

#[test]
fn dropout_of_everything_is_zeros() {
    let mut rng = Rng::new(0);
    let mut twin = rng.clone();
    let x = Tensor::from_slice(gpu(), &[1.0, f32::NAN, f32::INFINITY, -2.0, 3.0], [5]).requires_grad();
    let y = x.dropout(1.0, &mut rng);
    assert_eq!(y.to_vec::<f32>().unwrap(), [0.0; 5]);
    let grads = y.sum_all().backward().unwrap();
    assert_eq!(grads.get(&x).unwrap().to_vec::<f32>().unwrap(), [0.0; 5]);
    // It takes a stream like any other draw.
    let _ = x.dropout(0.5, &mut twin);
    assert_eq!(rng.state(), twin.state());
}

#[test]
#[should_panic(expected = "dropout: probability 1.5 is outside [0, 1]")]
fn dropout_of_more_than_everything_panics() {
    let _ = Tensor::ones(gpu(), [3]).dropout(1.5, &mut Rng::new(0));
}

#[test]
#[should_panic(expected = "dropout: probability NaN is outside [0, 1]")]
fn dropout_of_no_number_panics() {
    let _ = Tensor::ones(gpu(), [3]).dropout(f32::NAN, &mut Rng::new(0));
}
