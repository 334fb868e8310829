//! Arrays of the crate ndarray, in every layout, to tensors and back.

use crate::support::gpu;
use half::{bf16, f16};
use ndarray::{Array, ArrayD, Axis, IxDyn, array, s};
use tiebeam::error::ErrorKind;
use tiebeam::{DType, Element, Result, Tensor};

/// Compares the tensor of an array with its elements in row-major order, and with the array that is read back.
fn round_trip<E: Element + PartialEq + std::fmt::Debug>(array: &ndarray::ArrayRef<E, IxDyn>) {
    let x = Tensor::from_ndarray(gpu(), array);
    assert_eq!((x.dtype(), &x.shape()[..]), (E::DTYPE, array.shape()));
    assert_eq!(x.to_vec::<E>().unwrap(), array.iter().copied().collect::<Vec<_>>());
    assert_eq!(x.to_ndarray::<E>().unwrap(), array.to_owned());
    let back: ArrayD<E> = (&x).try_into().unwrap();
    assert_eq!(back, array.to_owned());
}

#[test]
fn every_layout_and_type_is_read() {
    let cube = Array::from_iter(0..30).into_shape_with_order(IxDyn(&[2, 3, 5])).unwrap();
    let mut reversed = cube.view();
    reversed.invert_axis(Axis(1));
    reversed.invert_axis(Axis(2));
    let views = [
        cube.view(),
        cube.t(),
        reversed,
        cube.slice(s![.., 1..;2, ..;2]).into_dyn(),
        cube.slice(s![.., .., 1..1]).into_dyn(),
        cube.index_axis(Axis(0), 1),
    ];
    for view in views {
        round_trip(&view);
        round_trip(&view.mapv(|x: i32| x as f32));
        round_trip(&view.mapv(|x: i32| x.cast_unsigned()));
        round_trip(&view.mapv(|x: i32| f16::from_f32(x as f32)));
        round_trip(&view.mapv(|x: i32| bf16::from_f32(x as f32)));
    }
    round_trip(&ndarray::arr0(2.5f32).into_dyn());
    let row = array![1u32, 2, 3];
    round_trip(&row.broadcast((4, 3)).unwrap().into_dyn());
    // A view of a tensor is read as it is seen.
    let x = Tensor::from_ndarray(gpu(), &array![[1f32, 2.0], [3.0, 4.0]]);
    assert_eq!(x.t().to_ndarray::<f32>().unwrap(), array![[1.0, 3.0], [2.0, 4.0]].into_dyn());
}

#[test]
fn conversions_return_errors() {
    let large = ArrayD::<f32>::zeros(IxDyn(&[1; 7]));
    for result in [Tensor::try_from((gpu(), &large)), Tensor::try_from((gpu(), large.view()))] {
        let error = result.expect_err("7 axes");
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("more than 6 axes"), "{error}");
    }
    let x = Tensor::try_from((gpu(), array![1u32, 2])).unwrap();
    let wrong: Result<ArrayD<f32>> = (&x).try_into();
    assert!(wrong.unwrap_err().to_string().contains("asked for f32 of a tensor of u32"));
    let halves: ArrayD<f16> = (&x.cast(DType::F16)).try_into().unwrap();
    assert_eq!(halves[[1]], f16::from_f32(2.0));
}

#[test]
#[should_panic(expected = "more than 6 axes")]
fn an_array_of_too_many_axes_panics() {
    let _ = Tensor::from_ndarray(gpu(), &ArrayD::<f32>::zeros(IxDyn(&[1; 7])));
}
