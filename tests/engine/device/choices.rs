//! Measured choices of kernels are stored and read again, and ignored if they cannot be trusted.

use super::folder::Folder;
use super::*;
use std::path::Path;
use tiebeam::Options;
use tiebeam::gpu::Tuning;

fn with(tuning: Tuning, folder: &Path) -> Gpu {
    let options = Options::default().tuning(Some(tuning)).cache(Some(folder.to_path_buf()));
    Gpu::open_with(options).expect("these tests need an adapter")
}

/// A product of whole numbers, which has the same bits with every kernel.
fn product(gpu: &Gpu) -> Vec<f32> {
    let whole: Vec<f32> = (0..64 * 64).map(|i| (i * 7 % 31) as f32 - 15.0).collect();
    let x = Tensor::from_slice(gpu, &whole, [64, 64]);
    x.matmul(&x.t()).to_vec().expect("readable")
}

#[test]
fn what_is_measured_is_kept_and_read_again() {
    let scratch = Folder::new("kept");
    // Made by the first save.
    let folder = scratch.join("cache");
    let tuned = with(Tuning::On, &folder);
    let want = product(gpu());
    assert_eq!(product(&tuned), want);
    let choices = tuned.choices();
    assert_eq!(choices.len(), 1, "{choices:?}");
    let again = with(Tuning::Read, &folder);
    assert_eq!(again.choices(), choices);
    assert_eq!(product(&again), want);
    assert!(with(Tuning::Off, &folder).choices().is_empty());
    // A choice that another process has stored meanwhile stays.
    let other = with(Tuning::On, &folder);
    let x = Tensor::ones(&other, [16, 32]);
    x.matmul(&x.t()).to_vec::<f32>().unwrap();
    assert_eq!(with(Tuning::Read, &folder).choices().len(), 2);
}

#[test]
fn a_file_that_cannot_be_trusted_is_left_out() {
    let scratch = Folder::new("broken");
    // Made by the first save.
    let folder = scratch.join("cache");
    let tuned = with(Tuning::On, &folder);
    let want = product(&tuned);
    let file = tuned.choices_file().expect("the folder was given").to_path_buf();
    let text = std::fs::read_to_string(&file).unwrap();
    let head = text.lines().next().unwrap();
    let key = tuned.choices().into_keys().next().unwrap();
    // Files that are truncated, are not text, or belong to other kernels are ignored.
    let broken = [
        text.as_bytes()[..head.len() / 2].to_vec(),
        vec![0xff; 100],
        text.replacen(head, "tiebeam 1 something else", 1).into_bytes(),
        format!("{head}\nno choice\n").into_bytes(),
    ];
    for bytes in broken {
        std::fs::write(&file, &bytes).unwrap();
        let gpu = with(Tuning::Read, &folder);
        assert!(gpu.choices().is_empty(), "{:?}", String::from_utf8_lossy(&bytes));
        assert_eq!(product(&gpu), want);
    }
    // Kernels that do not exist or would divide by zero are not used.
    for choice in ["direct 0x0x0 of 0x0", "tiled 7x7 of 3x3", "nothing"] {
        std::fs::write(&file, format!("{head}\n{key} = {choice}\n")).unwrap();
        assert_eq!(product(&with(Tuning::Read, &folder)), want, "{choice}");
    }
    // Measuring again replaces the broken file.
    std::fs::write(&file, [0xff; 100]).unwrap();
    product(&with(Tuning::On, &folder));
    assert_eq!(with(Tuning::Read, &folder).choices().len(), 1);
}

#[test]
fn choices_come_with_a_program_by_adapter_or_by_class() {
    let scratch = Folder::new("shipped");
    let folder = scratch.join("cache");
    let tuned = with(Tuning::On, &folder);
    product(&tuned);
    let (mine, export) = (tuned.choices(), scratch.join("choices.txt"));
    tuned.export_choices(&export).expect("a folder of the test");
    let open = |cache: &str, tuning| {
        let (cache, choices) = (Some(scratch.join(cache)), Some(export.clone()));
        Gpu::open_with(Options::default().tuning(Some(tuning)).cache(cache).choices(choices))
    };
    let empty = |tuning| open("empty", tuning).expect("a whole file").choices();
    assert_eq!(empty(Tuning::Read), mine);
    assert!(empty(Tuning::Off).is_empty(), "off is off");
    // From another adapter of the same class, the choices of kernels are used, but not the measured width.
    let text = std::fs::read_to_string(&export).unwrap();
    let (head, rest) = text.split_once('\n').unwrap();
    let (_, of_class) = head.split_once("; ").unwrap();
    let other = format!("tiebeam 2 another card; {of_class}\ndevice width = 99\n{rest}");
    std::fs::write(&export, &other).unwrap();
    assert_eq!(empty(Tuning::Read), mine);
    // The adapter's own section has precedence over that of its class, and measurements on this machine over both.
    let key = mine.keys().next().unwrap();
    std::fs::write(&export, format!("{other}{head}\n{key} = tiled 32x32 of 4x4\n")).unwrap();
    assert_eq!(empty(Tuning::Read)[key], "tiled 32x32 of 4x4");
    assert_eq!(open("cache", Tuning::Read).unwrap().choices(), mine);
    // Sections of another class or of other kernels are ignored.
    std::fs::write(&export, "tiebeam 2 another card; Vulkan; 1; another class; 0\nx = y\n").unwrap();
    assert!(empty(Tuning::Read).is_empty());
    // The user named this file, so an error in it is reported.
    std::fs::write(&export, "no section\n").unwrap();
    let said = open("empty", Tuning::Read).expect_err("no such file").to_string();
    assert!(said.contains("give a file that 'tiebeam tune --export' wrote"), "{said}");
    std::fs::remove_file(&export).unwrap();
    assert!(open("empty", Tuning::Read).is_err());
}
