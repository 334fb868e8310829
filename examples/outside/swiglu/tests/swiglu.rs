//! The op agrees with its reference in value and gradient, at sizes of 1, of a prime and above a workgroup; its misuse panics at the
//! caller's line, and a mistake in a kernel is told.

use std::error::Error;
use std::panic::catch_unwind;
use swiglu::swiglu;
use tiebeam::op::{Destination, Launch, Op, Sink, Source};
use tiebeam::ops::case::{Array, Case, Input};
use tiebeam::{DType, Gpu, Tensor};

type Outcome = Result<(), Box<dyn Error>>;

fn reference(x: &[Array]) -> Array {
    Array::from_fn(x[0].shape, |i| {
        let (g, u) = (x[0].data[i], x[1].data[i]);
        g / (1.0 + (-g).exp()) * u
    })
}

#[test]
fn it_agrees_with_a_reference() -> Outcome {
    let gpu = Gpu::open()?;
    for shape in [[1, 1], [7, 11], [3, 67]] {
        let inputs = vec![Input::normal(shape), Input::normal(shape)];
        let forward = |x: &[Tensor]| swiglu(&x[0], &x[1]);
        Case::new(format!("{shape:?}"), inputs, forward, reference).ulps(16.0, 32.0).check(&gpu)?;
        // Strided operands, and types of 16 bits.
        let turned = [shape[1], shape[0]];
        let inputs = vec![Input::normal(turned), Input::normal(shape).dtype(DType::F16).fixed()];
        let forward = |x: &[Tensor]| swiglu(&x[0].t(), &x[1]);
        let strided = |x: &[Array]| {
            let [rows, columns] = [x[0].shape[1], x[0].shape[0]];
            let gate = Array::from_fn([rows, columns], |i| x[0].data[i % columns * rows + i / columns]);
            reference(&[gate, x[1].clone()])
        };
        Case::new(format!("{shape:?} strided"), inputs, forward, strided).ulps(16.0, 32.0).check(&gpu)?;
    }
    Ok(())
}

#[test]
fn a_check_finds_a_wrong_gradient() -> Outcome {
    let gpu = Gpu::open()?;
    let forward = |x: &[Tensor]| swiglu(&x[0], &x[1].detach());
    let inputs = vec![Input::normal([3, 4]), Input::normal([3, 4])];
    let told = Case::new("no gradient of up", inputs, forward, reference).ulps(16.0, 32.0).check(&gpu);
    let told = told.expect_err("the second gradient is missing").to_string();
    assert!(told.contains("gradient of input 1"), "{told}");
    Ok(())
}

#[test]
fn misuse_is_told() -> Outcome {
    let gpu = Gpu::open()?;
    let [x, y] = [[2, 3], [3, 2]].map(|shape| Tensor::zeros(&gpu, shape));
    assert!(catch_unwind(|| swiglu(&x, &y)).is_err(), "shapes that differ");
    // The kernel writes `y`, and another handle would see its elements change.
    let (source, shared) = (Source::text("nothing", "@compute @workgroup_size(1) fn main() {}"), x.clone());
    let write = || Launch::new("nothing", &source, "main", [1; 3]).output("y", &shared).turns(0);
    assert!(catch_unwind(|| drop(write())).is_err(), "a tensor in use");
    Ok(())
}

#[test]
fn a_mistake_in_a_kernel_is_told_with_its_line() -> Outcome {
    let gpu = Gpu::open()?;
    let text = "@group(0) @binding(0) var<storage, read_write> y: array<f32>;\n@compute @workgroup_size(1)\nfn main() { y[0] = 1u; }\n";
    let source = Source::text("halves", text);
    let y = Tensor::empty(&gpu, "halves", [1], DType::F32);
    gpu.launch(Launch::new("halves", &source, "main", [1; 3]).output("y", &y).turns(0));
    let told = y.to_vec::<f32>().expect_err("it does not compile").to_string();
    assert!(told.contains("halves") && told.contains('3'), "{told}");
    assert!(gpu.take_fault().is_some());
    assert_eq!(Tensor::ones(&gpu, [1]).to_vec::<f32>()?, [1.0], "the device works on");
    Ok(())
}

/// The kernel of an op of one's own runs with bounds checks: an index far outside touches nothing.
#[test]
fn an_index_outside_touches_nothing_else() -> Outcome {
    let gpu = Gpu::open()?;
    let text = "@group(0) @binding(0) var<storage, read_write> y: array<f32>;\n@compute @workgroup_size(64)\nfn main(@builtin(local_invocation_index) i: u32) { y[i * 1000000u] = f32(i); }\n";
    let source = Source::text("outside", text);
    let around: Vec<Tensor> = (0..4).map(|_| Tensor::ones(&gpu, [1024])).collect();
    around.iter().for_each(Tensor::evaluate);
    let y = Tensor::empty(&gpu, "outside", [64], DType::F32);
    gpu.launch(Launch::new("outside", &source, "main", [1; 3]).output("y", &y).turns(0));
    y.to_vec::<f32>()?;
    for x in around {
        assert!(x.to_vec::<f32>()?.iter().all(|&v| v == 1.0));
    }
    Ok(())
}

/// What the host can get wrong in a launch is an error of the result or a sentence at the caller's line, and costs nothing else.
#[test]
fn wrong_launches_are_told_and_cost_nothing_else() -> Outcome {
    let (gpu, other) = (Gpu::open()?, Gpu::open()?);
    let x = Tensor::ones(&gpu, [4]);
    let told = |y: &Tensor| y.to_vec::<f32>().expect_err("it is refused").to_string();
    let elsewhere = swiglu(&Tensor::ones(&other, [4]), &x);
    assert!(told(&elsewhere).contains("is on another device"), "{}", told(&elsewhere));

    let copy = "@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(1) fn main() { y[0] = x[0]; }";
    let source = Source::text("copy", copy);
    let fresh = || Tensor::empty(&gpu, "copy", [4], DType::F32);
    let launch = || Launch::new("copy", &source, "main", [1; 3]).turns(0);
    for (what, words) in
        [("one tensor read and written", "binds the same memory"), ("a name twice", "binds x twice")]
    {
        let y = fresh();
        let launch = if words.contains("twice") {
            launch().bind("x", &x).bind("x", &x)
        } else {
            launch().bind("x", &y)
        };
        gpu.launch(launch.output("y", &y));
        assert!(told(&y).contains(words), "{what}: {}", told(&y));
        gpu.take_fault();
    }
    let (y, late) = (fresh(), launch().bind("x", &x));
    let late = late.output("y", &y);
    let seen = y.clone();
    assert!(
        catch_unwind(std::panic::AssertUnwindSafe(|| gpu.launch(late))).is_err(),
        "held by somebody else"
    );
    drop(seen);
    let matrices =
        Source::text("units", "enable f16;\n// coop_mat8x8\n@compute @workgroup_size(1) fn main() {}");
    let y = fresh();
    gpu.launch(Launch::new("units", &matrices, "main", [1; 3]).output("y", &y).turns(0));
    assert!(told(&y).contains("cooperative matrices are not checked"), "{}", told(&y));
    gpu.take_fault();
    assert_eq!(x.to_vec::<f32>()?, [1.0; 4], "what was there before is there");
    Ok(())
}

/// A kernel reads a tensor as what it is, and not its bits as another type.
#[test]
fn a_tensor_of_another_type_is_refused() -> Outcome {
    let gpu = Gpu::open()?;
    let x = Tensor::ones(&gpu, [4]);
    let run = |word: &str, x: &Tensor, dtype: DType| {
        let text = format!(
            "@group(0) @binding(0) var<storage, read> x: array<vec4<{word}>>;
@group(0) @binding(1) var<storage, read_write> y: array<{word}>;
@compute @workgroup_size(1) fn main() {{ y[0] = x[0].y; }}"
        );
        let (source, y) = (Source::text("second", text), Tensor::zeros(&gpu, [4]).cast(dtype));
        y.evaluate();
        gpu.launch(Launch::new("second", &source, "main", [1; 3]).bind("x", x).output("y", &y).turns(0));
        let done = y.cast(DType::F32).to_vec::<f32>().map(|y| y[0]).map_err(|error| error.to_string());
        gpu.take_fault();
        done
    };
    for (word, dtype) in [("f32", DType::F32), ("u32", DType::U32), ("i32", DType::I32)] {
        assert_eq!(run(word, &x.cast(dtype), dtype), Ok(1.0), "{word}");
        for other in
            [DType::F32, DType::U32, DType::I32, DType::F16].into_iter().filter(|&other| other != dtype)
        {
            let done = run(word, &x.cast(other), dtype);
            if (word, other) == ("u32", DType::F16) {
                assert!(done.is_ok(), "two of 16 bits are one u32: {done:?}");
            } else {
                let told = done.expect_err("it is refused");
                assert!(told.contains(&format!("as x, which is of {word}")), "{told}");
            }
        }
    }
    assert!(run("i32", &x.cast(DType::I32), DType::F32).unwrap_err().contains("as y, which is of i32"));
    Ok(())
}

/// An op that answers a destination with another tensor.
struct Elsewhere;

impl Op for Elsewhere {
    fn name(&self) -> &'static str {
        "elsewhere"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        sink.add_with(0, |into| match into {
            Destination::New => dy.clone(),
            _ => dy.scale(1.0),
        });
    }
}

#[test]
fn a_gradient_that_is_written_elsewhere_is_told() -> Outcome {
    let gpu = Gpu::open()?;
    let x = Tensor::ones(&gpu, [2]).requires_grad();
    let op = || x.detach().copy().made_by(&[&x], || Box::new(Elsewhere));
    // The incoming gradient is held by others, so it is not added to in place.
    let seed = Tensor::ones(&gpu, [2]);
    let grads = op().add(&op()).backward_with(&seed);
    let sum: Vec<f32> = grads?.get(&x).ok_or("no gradient")?.to_vec()?;
    assert_eq!((sum, seed.to_vec::<f32>()?), (vec![2.0; 2], vec![1.0; 2]));
    // A sum that is there already would be lost.
    let lost = catch_unwind(|| op().add(&x).add(&x).backward_with(&seed).map(drop));
    let told = lost.expect_err("it is refused").downcast::<String>().map_err(|_| "a panic without words")?;
    assert!(told.contains("must be returned in the tensor of its destination"), "{told}");
    Ok(())
}
