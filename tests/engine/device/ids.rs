//! Ids outside a table are ignored by default, and reported once by a device that checks ids.

use super::*;
use tiebeam::ops::sequence::rope::{Pairing, Rope};
use tiebeam::{Error, Step};

fn ids(gpu: &Gpu, ids: &[u32]) -> Tensor {
    Tensor::from_slice(gpu, ids, [ids.len()])
}

fn signed(gpu: &Gpu, ids: &[i32]) -> Tensor {
    Tensor::from_slice(gpu, ids, [ids.len()])
}

fn said<T>(result: tiebeam::Result<T>) -> String {
    let Err(error) = result else { panic!("should have been told") };
    assert!(matches!(error, Error::Outside { .. }), "{error}");
    error.to_string()
}

#[test]
fn ids_outside_a_table_are_told_once() {
    let gpu = checked_gpu();
    assert!(gpu.is_checked());
    let table = drawn(&gpu, 1, &[50, 4]);
    let good = table.sum_all();
    let y = table.embedding(&ids(&gpu, &[3, 49, 50, 7, 70_000, 50]));
    assert_eq!(said(y.to_vec::<f32>()), "embedding: id 50 at place 2 is outside 0..50; 3 such ids");
    // The finding is reported only once, and the values for such ids are 0.
    let rows = y.to_vec::<f32>().unwrap();
    let stored = normal(1, 200);
    assert_eq!(rows[..8], [&stored[12..16], &stored[196..200]].concat());
    assert_eq!((&rows[8..12], &rows[12..16], &rows[16..]), (&[0.0; 4][..], &stored[28..32], &[0.0; 8][..]));
    // Any readback reports a finding. A flush does not wait, so it does not.
    let _ = table.embedding(&signed(&gpu, &[0, -7]));
    gpu.flush().unwrap();
    assert_eq!(said(good.item()), "embedding: id -7 at place 1 is outside 0..50; 1 such id");
    good.item().unwrap();
    table.index_select(0, &signed(&gpu, &[-1, 50])).evaluate();
    assert_eq!(said(gpu.synchronize()), "index_select: id -1 at place 0 is outside 0..50; 2 such ids");
    // A readback that is dropped without a wait leaves the finding to the next one.
    table.gather(1, &Tensor::from_slice(&gpu, &[1u32, 4], [1, 2])).evaluate();
    drop(good.read::<f32>().unwrap());
    assert_eq!(said(gpu.synchronize()), "gather: id 4 at place 1 is outside 0..4; 1 such id");
    table.slice(0, 0..3).index_sum(0, &ids(&gpu, &[0, 2, 1]), 2).evaluate();
    let told = said(good.read::<f32>().unwrap().wait());
    assert_eq!(told, "index_sum: id 2 at place 1 is outside 0..2; 1 such id");
    let rope = Rope::new(&gpu, 20, 8, 1e4, Pairing::Halves);
    drawn(&gpu, 2, &[1, 1, 3, 8]).rope_at(&rope, &ids(&gpu, &[19, 20, 21])).evaluate();
    assert_eq!(said(gpu.synchronize()), "rope: id 20 at place 1 is outside 0..20; 2 such ids");
    gpu.synchronize().unwrap();
    assert!(gpu.take_fault().is_none(), "no fault of the device");
}

#[test]
fn an_ignored_target_is_no_mistake() {
    let gpu = checked_gpu();
    let logits = drawn(&gpu, 1, &[4, 5]).requires_grad();
    let loss = |targets: &Tensor, ignore| logits.cross_entropy(targets, ignore);
    assert!(loss(&signed(&gpu, &[0, -100, 4, -100]), Some(-100)).item().unwrap().is_finite());
    let wrong = loss(&signed(&gpu, &[0, -100, 5, -1]), Some(-100));
    assert_eq!(said(wrong.item()), "cross_entropy: id 5 at place 2 is outside 0..5; 2 such ids");
    assert!(wrong.item().unwrap().is_nan());
    let unsigned = loss(&ids(&gpu, &[0, 1, 2, 4_000_000_000]), None);
    assert_eq!(said(unsigned.item()), "cross_entropy: id 4000000000 at place 3 is outside 0..5; 1 such id");
}

#[test]
fn many_ids_and_many_tables() {
    let gpu = checked_gpu();
    // More ids than one workgroup reads in an iteration, then more tables than a page of findings has slots.
    let mut many = vec![1u32; 100_000];
    many[70_001] = 9;
    many[99_999] = 8;
    let small = drawn(&gpu, 1, &[5, 2]);
    small.embedding(&ids(&gpu, &many)).evaluate();
    assert_eq!(said(gpu.synchronize()), "embedding: id 9 at place 70001 is outside 0..5; 2 such ids");
    for rows in 1..=130usize {
        let table = Tensor::ones(&gpu, [rows, 1]);
        let y = table.embedding(&ids(&gpu, &[0, rows as u32]));
        let want = format!("embedding: id {rows} at place 1 is outside 0..{rows}; 1 such id");
        assert_eq!(said(y.to_vec::<f32>()), want);
    }
    // Valid ids give no finding, and an empty list is not checked.
    small.embedding(&ids(&gpu, &[])).evaluate();
    assert!(small.embedding(&ids(&gpu, &[0, 4])).to_vec::<f32>().is_ok());
}

#[test]
fn a_replay_tells_like_the_code() {
    let gpu = checked_gpu();
    let table = drawn(&gpu, 1, &[5, 2]);
    let inside = ids(&gpu, &[0, 4]);
    let mut step = Step::record(&gpu, &[&inside], |x| Ok(vec![table.embedding(&x[0])])).unwrap();
    assert!(step.outputs()[0].to_vec::<f32>().is_ok());
    for id in [5, 6] {
        step.run(&[&ids(&gpu, &[0, id])]).unwrap();
        let want = format!("embedding: id {id} at place 1 is outside 0..5; 1 such id");
        assert_eq!(said(step.outputs()[0].to_vec::<f32>()), want);
        step.run(&[&inside]).unwrap();
        assert!(step.outputs()[0].to_vec::<f32>().is_ok());
    }
    // Two replays without a readback in between give one finding.
    for _ in 0..2 {
        step.run(&[&ids(&gpu, &[7, 8])]).unwrap();
    }
    assert_eq!(said(gpu.synchronize()), "embedding: id 7 at place 0 is outside 0..5; 4 such ids");
}

#[test]
fn nothing_is_launched_where_nothing_checks() {
    let gpu = quiet();
    let table = drawn(&gpu, 1, &[5, 2]);
    let outside = ids(&gpu, &[0, 5]);
    let before = gpu.dispatches();
    let y = table.embedding(&outside);
    assert_eq!(y.to_vec::<f32>().is_ok(), !gpu.is_checked());
    assert_eq!(gpu.dispatches() - before, 1 + gpu.is_checked() as u64);
}
