//! Commands that wait for the compiler.

use super::*;
use crate::Options;
use crate::error::ErrorKind;
use crate::gpu::kernel::Part;
use crate::gpu::shader::Source;
use crate::gpu::value::Place;

const BYTES: u64 = 4 * 64;

/// A kernel `y[i] = value`, where `value` is an expression of `x[i]`.
fn kernel(name: &'static str, value: &str, lanes: u32) -> Source {
    let text = format!(
        "@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@compute @workgroup_size({lanes})
fn main(@builtin(global_invocation_id) id: vec3<u32>) {{ y[id.x % 64u] = {value}; }}
"
    );
    Source::text(name, text)
}

/// A kernel that naga accepts and no driver does.
fn impossible() -> Source {
    kernel("impossible", "x[id.x % 64u]", 8192)
}

fn part(buffer: &Arc<Buffer>) -> Part {
    Part::first(buffer, BYTES)
}

fn launch<'a>(source: &'a Source, x: &Arc<Buffer>, y: &Arc<Buffer>) -> Launch<'a> {
    Launch::new("test", source, "main", [1; 3]).bind("x", part(x)).bind_mut("y", part(y)).turns(0)
}

/// Launches a kernel from `x` into a new buffer.
fn run(gpu: &Gpu, source: &Source, x: &Arc<Buffer>) -> Arc<Buffer> {
    let y = gpu.alloc("test", BYTES);
    gpu.launch(launch(source, x, &y));
    y
}

fn filled(gpu: &Gpu, value: f32) -> Arc<Buffer> {
    gpu.upload("test", bytemuck::cast_slice(&[value; 64]), BYTES)
}

fn value(gpu: &Gpu, buffer: &Buffer) -> Result<f32> {
    let bytes = gpu.read(buffer, 0, BYTES)?;
    let all: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
    assert!(all.iter().all(|x| *x == all[0]), "{all:?}");
    Ok(all[0])
}

fn waiting(gpu: &Gpu) -> usize {
    lock(&gpu.0.recorder).waiting.len()
}

#[test]
fn the_recording_thread_goes_on_and_keeps_the_order() {
    let gpu = Gpu::open().unwrap();
    let (double, more) = (kernel("double", "2.0 * x[id.x]", 64), kernel("more", "x[id.x] + 1.0", 64));
    let x = filled(&gpu, 3.0);
    assert_eq!(value(&gpu, &run(&gpu, &double, &x)).unwrap(), 6.0);
    let Some(held) = gpu.hold_compiler() else { return };
    let y = run(&gpu, &more, &x);
    assert_eq!(waiting(&gpu), 1, "the thread that records does not compile");
    // These kernels are there, but their operands are not. The last one overwrites what the first has read.
    let z = run(&gpu, &double, &y);
    gpu.launch(launch(&double, &z, &x));
    assert_eq!(waiting(&gpu), 3);
    lock(&gpu.0.recorder).send(&gpu);
    assert_eq!(waiting(&gpu), 3, "a full batch goes without them");
    drop(held);
    assert_eq!(value(&gpu, &z).unwrap(), 8.0);
    assert_eq!(waiting(&gpu), 0);
    assert_eq!([value(&gpu, &y).unwrap(), value(&gpu, &x).unwrap()], [4.0, 16.0]);
}

#[test]
fn uploads_spare_what_waiting_commands_read() {
    let gpu = Gpu::open().unwrap();
    let Some(held) = gpu.hold_compiler() else { return };
    let x = filled(&gpu, 1.0);
    let y = run(&gpu, &kernel("more", "x[id.x] + 1.0", 64), &x);
    drop(x);
    // The batch so far. In the next one an upload might take the memory of x, which the waiting command still reads.
    lock(&gpu.0.recorder).send(&gpu);
    let others: Vec<_> = (0..4).map(|_| filled(&gpu, 7.0)).collect();
    lock(&gpu.0.recorder).send(&gpu);
    drop(held);
    assert_eq!(value(&gpu, &y).unwrap(), 2.0);
    assert!(others.iter().all(|other| value(&gpu, other).unwrap() == 7.0));
}

#[test]
fn a_refused_kernel_leaves_out_what_depends_on_it() {
    let gpu = Gpu::open().unwrap();
    let (double, bad) = (kernel("double", "2.0 * x[id.x]", 64), impossible());
    let x = filled(&gpu, 3.0);
    let Some(held) = gpu.hold_compiler() else { return };
    let y = run(&gpu, &bad, &x);
    let after = run(&gpu, &double, &y);
    let beside = run(&gpu, &double, &x);
    // Memory that the pool hands out again belongs to nobody who was refused.
    let gone = run(&gpu, &bad, &x);
    drop(gone);
    let again = run(&gpu, &double, &x);
    let whole = gpu.alloc("test", BYTES);
    let [lost, other] = [(); 2].map(|()| whole.part(&gpu, BYTES / 2));
    gpu.launch(launch(&bad, &x, &lost));
    gpu.launch(launch(&double, &x, &other));
    let of_whole = run(&gpu, &double, &whole);
    assert_eq!(waiting(&gpu), 8);
    drop(held);
    let said = value(&gpu, &beside).unwrap_err().to_string();
    assert!(said.contains("impossible (test)") && said.contains("workgroup"), "{said}");
    assert_eq!(gpu.take_fault().expect("a lost pipeline is a fault").to_string(), said);
    assert_eq!([value(&gpu, &beside).unwrap(), value(&gpu, &again).unwrap()], [6.0; 2]);
    assert!(other.data().is_ok(), "another part of the same memory");
    for buffer in [&y, &after, &lost, &of_whole] {
        assert_eq!(value(&gpu, buffer).unwrap_err().to_string(), said);
    }
    assert!(gpu.take_fault().is_none(), "its results do not put it back");
    // It fails again, at once.
    assert_eq!(gpu.pipeline(&launch(&bad, &x, &beside)).map(drop).unwrap_err().to_string(), said);
    let last = run(&gpu, &bad, &x);
    assert_eq!((waiting(&gpu), last.data().map(drop).unwrap_err().to_string()), (0, said));
}

#[test]
fn a_change_is_refused_before_anything_is_written() {
    let gpu = Gpu::open().unwrap();
    let (double, bad) = (kernel("double", "2.0 * x[id.x]", 64), impossible());
    let (x, y) = (filled(&gpu, 3.0), filled(&gpu, 5.0));
    let launches = [launch(&double, &x, &y), launch(&bad, &x, &y)];
    assert!(gpu.change(std::slice::from_ref(&y), &launches).unwrap_err().to_string().contains("impossible"));
    gpu.take_fault().expect("a lost pipeline is a fault");
    assert_eq!(value(&gpu, &y).unwrap(), 5.0);
    // Nor is anything changed by what is not computed, though nobody knows that when the change is asked for.
    let lost = run(&gpu, &kernel("impossible", "3.0 * x[id.x % 64u]", 8192), &x);
    assert!(gpu.change(std::slice::from_ref(&y), &[launch(&double, &lost, &y)]).is_err());
    gpu.take_fault().expect("a lost pipeline is a fault");
    assert_eq!(value(&gpu, &y).unwrap(), 5.0);
}

#[test]
fn a_wait_for_the_compiler_has_a_limit() {
    let gpu = Gpu::open_with(Options::default().wait(Some(Duration::from_millis(50)))).unwrap();
    let (x, more) = (filled(&gpu, 3.0), kernel("more", "x[id.x] + 1.0", 64));
    let (was, y) = (filled(&gpu, 5.0), filled(&gpu, 5.0));
    let Some(held) = gpu.hold_compiler() else { return };
    let z = run(&gpu, &more, &x);
    let late = |error: Error| {
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        assert!(error.to_string().contains("for the driver to compile more (test)"), "{error}");
    };
    late(value(&gpu, &z).unwrap_err());
    late(gpu.flush().unwrap_err());
    late(gpu.synchronize().unwrap_err());
    late(gpu.change(std::slice::from_ref(&y), &[launch(&more, &x, &y)]).unwrap_err());
    late(
        gpu.copy_all(&[(
            Place { buffer: z.clone(), offset: 0 },
            Place { buffer: y.clone(), offset: 0 },
            BYTES,
        )])
        .unwrap_err(),
    );
    // Neither is anything lost, nor is the device at fault.
    assert!(gpu.take_fault().is_none() && [&z, &y].iter().all(|buffer| buffer.data().is_ok()));
    drop(held);
    let later =
        |buffer| (0..1000).find_map(|_| value(&gpu, buffer).ok()).expect("the driver comes to an end");
    assert_eq!([later(&z), later(&y), later(&was)], [4.0, 5.0, 5.0]);
}

#[test]
fn a_lost_change_marks_all_its_buffers_though_it_had_to_wait() {
    let gpu = Gpu::open().unwrap();
    let (double, more) = (kernel("double", "2.0 * x[id.x]", 64), kernel("more", "x[id.x] + 1.0", 64));
    let [x, y, other] = [3.0, 4.0, 5.0].map(|v| filled(&gpu, v));
    value(&gpu, &run(&gpu, &double, &x)).unwrap();
    let Some(held) = gpu.hold_compiler() else { return };
    // As if another thread had launched this after the change was checked.
    let _beside = run(&gpu, &more, &x);
    let change = launch(&double, &x, &y);
    let prepared = gpu.prepare(&change).unwrap();
    gpu.encode(&change, prepared, &[y.clone(), other.clone()]).unwrap();
    assert_eq!(waiting(&gpu), 2);
    drop(held);
    // A copy of a buffer onto itself, for which wgpu refuses the batch.
    let raw = x.data().unwrap();
    lock(&gpu.0.recorder).encoder(&gpu).unwrap().copy_buffer_to_buffer(raw, 0, raw, 0, 4);
    assert!(gpu.flush().is_err() && gpu.take_fault().is_some());
    assert!([&y, &other].iter().all(|buffer| buffer.data().is_err()) && x.data().is_ok());
}

#[test]
fn a_recording_with_a_refused_kernel_is_refused() {
    let gpu = Gpu::open().unwrap();
    let (x, bad) = (filled(&gpu, 3.0), impossible());
    let captured = gpu.capture(gpu.step_pool(), || Ok(run(&gpu, &bad, &x)));
    assert!(captured.map(drop).unwrap_err().to_string().contains("impossible (test)"));
    assert!(gpu.take_fault().is_some());
}

#[test]
fn two_threads_that_want_a_kernel_compile_it_once() {
    let gpu = Gpu::open().unwrap();
    let (x, more) = (filled(&gpu, 3.0), kernel("more", "x[id.x] + 1.0", 64));
    let y = gpu.alloc("test", BYTES);
    let both = std::thread::scope(|scope| {
        let ask = || gpu.pipeline(&launch(&more, &x, &y)).unwrap();
        let threads = [scope.spawn(ask), scope.spawn(ask)];
        threads.map(|thread| thread.join().unwrap())
    });
    assert!(Arc::ptr_eq(&both[0], &both[1]));
    assert!(both[0].wait().unwrap().is_ok());
}

#[test]
fn a_device_that_goes_takes_its_threads_along() {
    let gpu = Gpu::open().unwrap();
    let x = filled(&gpu, 1.0);
    let ys: Vec<_> =
        (0..12).map(|i| run(&gpu, &kernel("many", &format!("x[id.x] + {i}.0"), 64), &x)).collect();
    drop((x, ys));
    let inner = Arc::downgrade(&gpu.0);
    drop(gpu);
    assert!(inner.upgrade().is_none());
}
