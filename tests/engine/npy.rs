//! NumPy's files: what NumPy wrote is read, what is written has NumPy's bytes, and what is wrong is an error.

use crate::support::folder::{Folder, root};
use crate::support::gpu;
use half::{bf16, f16};
use std::fs::{read, write};
use std::path::PathBuf;
use tiebeam::store::{load_npy, load_npz, save_npy, save_npz};
use tiebeam::{DType, Error, Tensor};

fn numpy(name: &str) -> PathBuf {
    root().join("tests/vectors/npy").join(name)
}

fn load(name: &str) -> Tensor {
    load_npy(gpu(), numpy(&format!("{name}.npy"))).unwrap()
}

const F32: [f32; 6] = [1.5, -0.0, 3e38, f32::INFINITY, 1e-45, -2.0];

fn bits(x: &Tensor) -> Vec<u32> {
    x.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn what_numpy_wrote_is_read() {
    for name in ["f32", "version2", "version3"] {
        let x = load(name);
        assert_eq!(
            (x.shape()[..].to_vec(), bits(&x)),
            (vec![2, 3], F32.map(f32::to_bits).to_vec()),
            "{name}"
        );
    }
    assert_eq!(load("f16").to_vec::<f16>().unwrap(), [1.5, -65504.0, 6e-8].map(f16::from_f32));
    assert_eq!(bits(&load("f64")), [0.1, -0.0, f32::INFINITY].map(f32::to_bits));
    for (name, want) in [
        ("i8", vec![-128, 127]),
        ("i16", vec![-32768, 32767]),
        ("i32", vec![i32::MIN, i32::MAX]),
        ("i64", vec![i32::MIN, i32::MAX]),
        ("big_fortran", (0..6).collect()),
    ] {
        assert_eq!(load(name).to_vec::<i32>().unwrap(), want, "{name}");
    }
    for (name, want) in [
        ("bool", vec![1, 0, 1]),
        ("u8", vec![0, 255]),
        ("u16", vec![65535]),
        ("u32", vec![u32::MAX, 7]),
        ("u64", vec![u32::MAX]),
    ] {
        assert_eq!(load(name).to_vec::<u32>().unwrap(), want, "{name}");
    }
    assert_eq!((load("scalar").rank(), load("scalar").item().unwrap()), (0, 2.5));
    assert_eq!(load("empty").shape()[..], [0, 4]);
    assert_eq!(load("big").to_vec::<f32>().unwrap(), [1.5, -2.0]);
    assert_eq!(load("i32").shape()[..], [2, 1]);
    assert_eq!(load("big_fortran").shape()[..], [2, 3]);
}

/// A tensor has the shape and the elements of an array in Fortran order, whatever the order of its bytes was.
#[test]
fn fortran_order_is_put_right() {
    let x = load("fortran");
    assert_eq!(x.shape()[..], [2, 3, 4]);
    assert_eq!(x.to_vec::<f32>().unwrap(), (0..24).map(|i| i as f32).collect::<Vec<_>>());
}

#[test]
fn archives_of_numpy_are_read() {
    for name in ["stored.npz", "compressed.npz"] {
        let arrays = load_npz(gpu(), numpy(name)).unwrap();
        assert_eq!(arrays.keys().collect::<Vec<_>>(), ["folder/labels", "fortran", "layer.weight"]);
        assert_eq!(bits(&arrays["layer.weight"]), F32.map(f32::to_bits));
        assert_eq!(arrays["folder/labels"].to_vec::<i32>().unwrap(), [3, -1]);
        assert_eq!(
            arrays["fortran"].slice(1, 1..2).to_vec::<f32>().unwrap()[..5],
            [4.0, 5.0, 6.0, 7.0, 16.0]
        );
    }
}

#[test]
fn what_is_written_has_the_bytes_of_numpy() {
    let folder = Folder::new("npy");
    let path = folder.join("x.npy");
    for name in ["f32", "f16", "i32", "u32", "scalar", "empty"] {
        save_npy(&path, &load(name)).unwrap();
        assert_eq!(read(&path).unwrap(), read(numpy(&format!("{name}.npy"))).unwrap(), "{name}");
    }
    // A view is written as it is seen, and bf16 as the f32 of the same value.
    let x = Tensor::from_slice(gpu(), &F32, [2, 3]);
    save_npy(&path, &x.t()).unwrap();
    assert_eq!(bits(&load_npy(gpu(), &path).unwrap()), bits(&x.t().contiguous()));
    let halves = [1.0, -3.140625, f32::MAX].map(bf16::from_f32);
    save_npy(&path, &Tensor::from_slice(gpu(), &halves, [3])).unwrap();
    let back = load_npy(gpu(), &path).unwrap();
    assert_eq!((back.dtype(), back.to_vec::<f32>().unwrap()), (DType::F32, halves.map(f32::from).to_vec()));
    assert_eq!(folder.names(), ["x.npy"]);
}

#[test]
fn archives_are_written_whole_or_not_at_all() {
    let folder = Folder::new("npz");
    let path = folder.join("x.npz");
    let (x, y) = (Tensor::from_slice(gpu(), &F32, [2, 3]), Tensor::from_slice(gpu(), &[7u32], []));
    save_npz(&path, [("layer.weight", &x), ("a/ü", &y)]).unwrap();
    let first = read(&path).unwrap();
    let arrays = load_npz(gpu(), &path).unwrap();
    assert_eq!((bits(&arrays["layer.weight"]), arrays["a/ü"].to_vec::<u32>().unwrap()), (bits(&x), vec![7]));
    save_npz(&path, [("layer.weight", &x), ("a/ü", &y)]).unwrap();
    assert!(read(&path).unwrap() == first, "equal tensors give equal bytes");
    assert!(save_npz(&path, [("w", &x), ("w", &y)]).is_err());
    assert!(read(&path).unwrap() == first, "an error leaves the old file");
    save_npz(&path, std::iter::empty::<(&str, &Tensor)>()).unwrap();
    assert!(load_npz(gpu(), &path).unwrap().is_empty());
    assert!(matches!(save_npz(folder.join("no/such"), [("w", &x)]), Err(Error::Io { .. })));
    assert!(matches!(save_npy(folder.join("no/such"), &x), Err(Error::Io { .. })));
    assert_eq!(folder.names(), ["x.npz"]);
}

/// A refusal is an error of the file's content, which names the file.
fn refused(path: PathBuf) -> String {
    let loaded = if path.extension().is_some_and(|end| end == "npz") {
        load_npz(gpu(), &path).map(drop)
    } else {
        load_npy(gpu(), &path).map(drop)
    };
    let error = loaded.expect_err("this is refused");
    assert!(matches!(error, Error::Format { .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.starts_with(&path.display().to_string()), "{message}");
    message
}

#[test]
fn what_a_tensor_cannot_hold_is_refused_by_name() {
    for (name, words) in [
        ("f64_large", "element 1 is too large for f32"),
        ("i64_large", "element 1 is 2147483648, out of the range of i32"),
        ("u64_large", "element 0 is 4294967296, out of the range of u32"),
        ("complex", "'<c8'"),
        ("text", "'<U3'"),
        ("records", "records"),
        ("void", "'|V2'"),
        ("object", "pickle"),
        ("axes", "more than 6 axes"),
    ] {
        let message = refused(numpy(&format!("{name}.npy")));
        assert!(message.contains(words), "{name}: {message}");
    }
}

#[test]
fn damaged_files_are_errors() {
    let folder = Folder::new("npy-damaged");
    let (npy, npz) = (folder.join("x.npy"), folder.join("x.npz"));
    let damaged = |path: &PathBuf, bytes: &[u8]| {
        write(path, bytes).unwrap();
        refused(path.clone())
    };
    let whole = read(numpy("f32.npy")).unwrap();
    for cut in 0..whole.len() {
        damaged(&npy, &whole[..cut]);
    }
    assert!(
        damaged(&npy, &[&whole[..], b"x"].concat()).contains("something follows the 24 bytes of F32 [2, 3]")
    );
    assert!(damaged(&npy, &read(numpy("stored.npz")).unwrap()).contains("load_npz"));
    // A length beyond the limit is refused before memory is taken for it, and a shape is not believed either.
    let long = [&b"\x93NUMPY\x02\x00"[..], &u32::MAX.to_le_bytes(), b"{"].concat();
    assert!(damaged(&npy, &long).contains("claims 4294967295 bytes"));
    assert!(damaged(&npy, b"\x93NUMPY\x09\x00\x76\x00").contains("version 9.0"));
    let claiming = |shape: &str| {
        let text = format!("{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n");
        [&b"\x93NUMPY\x01\x00"[..], &(text.len() as u16).to_le_bytes(), text.as_bytes(), &[0; 16]].concat()
    };
    assert!(damaged(&npy, &claiming("(4294967295,)")).contains("needs 34359738360 bytes, it has 16"));
    for shape in ["(4294967296,)", "(4294967296, 4294967296, 4294967296)", "(18446744073709551615, 2)"] {
        assert!(damaged(&npy, &claiming(shape)).contains("2^32 - 1 elements"), "{shape}");
    }
    for name in ["stored.npz", "compressed.npz"] {
        let whole = read(numpy(name)).unwrap();
        for cut in (0..whole.len()).step_by(7) {
            damaged(&npz, &whole[..cut]);
        }
        // Whatever byte is changed, reading ends without a panic. Names and times may change unseen, elements may not.
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            write(&npz, &bytes).unwrap();
            if let Ok(arrays) = load_npz(gpu(), &npz) {
                for x in arrays.values().filter(|x| x.shape()[..] == [2, 3]) {
                    assert_eq!(bits(x), F32.map(f32::to_bits), "{name}: byte {at}");
                }
            }
        }
    }
    assert!(matches!(load_npy(gpu(), folder.join("none.npy")), Err(Error::Io { .. })));
    assert!(matches!(load_npz(gpu(), folder.join("none.npz")), Err(Error::Io { .. })));
}
