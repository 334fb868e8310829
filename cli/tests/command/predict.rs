//! `tiebeam predict`.

use crate::support::folder::Folder;
use crate::support::potentials::{calculator, crystal, frame};
use crate::{command, text};
use std::path::PathBuf;
use std::process::Output;
use tiebeam::geometry::xyz::{self, Frame};
use tiebeam::geometry::{Calculator, Cell, Ponita};

fn predict(arguments: &[&std::path::Path]) -> Output {
    command().arg("predict").args(arguments).output().expect("the command runs")
}

#[test]
fn predict_writes_what_the_calculator_gives() {
    let folder = Folder::new("predict");
    let [model, input, output] = ["model.safetensors", "in.xyz", "out.xyz"].map(|name| folder.join(name));
    calculator().potential().save(&model).expect("saved");
    let (_, cell) = crystal();
    let mut second = frame(9, 1, 1.0);
    (second.cell, second.energy, second.forces) = (Some(cell), None, None);
    second.other = [("name".to_string(), "a crystal".to_string())].into();
    let frames = [frame(7, 2, 2.4), second];
    xyz::write(&input, &frames).expect("written");
    let run = predict(&[&model, &input, &output]);
    let text = String::from_utf8_lossy(&run.stdout).into_owned();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert!(text.contains("2 frames") && text.contains("MAE"), "{text}");
    let want: Vec<Frame> = frames.iter().map(|f| calculator().predict(f).expect("finite")).collect();
    assert_eq!(xyz::read(&output).expect("read"), want);
    assert!(want[1].stress.is_some() && want[0].stress.is_none());
    let average = Calculator::new(calculator().potential().clone()).rotations(2);
    let want: Vec<Frame> = frames.iter().map(|f| average.predict(f).expect("finite")).collect();
    let options = ["--rotations", "2"].map(std::path::Path::new);
    let run = predict(&[&model, &input, &output, options[0], options[1]]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(xyz::read(&output).expect("read"), want);
    let run = predict(&[&model, &input, &output, options[0], "0".as_ref()]);
    assert!(!run.status.success(), "an average of none");
}

#[test]
fn predict_says_what_is_wrong_and_leaves_the_output() {
    let own = Folder::new("refusals");
    let scratch = |name: &str| own.join(name);
    let [model, input, output] = ["model.safetensors", "in.xyz", "out.xyz"].map(scratch);
    calculator().potential().save(&model).expect("saved");
    std::fs::write(&output, "as it was").expect("written");
    let hydrogen = Frame { species: vec![1], positions: vec![[0.0; 3]], ..Frame::default() };
    xyz::write(&input, &[frame(7, 2, 2.4), hydrogen]).expect("written");
    let missing = scratch("nothing.xyz");
    // Errors that can be found beforehand are reported first: before a frame that only the network refuses, and before the
    // model is opened.
    let [far, unwritable] = ["far.xyz", "unwritable.xyz"].map(scratch);
    let apart =
        Frame { species: vec![8, 29], positions: vec![[0.0; 3], [1e300, 0.0, 0.0]], ..Frame::default() };
    let flat = Cell { vectors: [[0.0; 3]; 3], periodic: [true; 3] };
    let flat = Frame { cell: Some(flat), ..frame(7, 1, 2.4) };
    xyz::write(&far, &[apart, flat]).expect("written");
    std::fs::write(&unwritable, "1\nvirial={a \"} note={a \"quote}\nCu 0 0 0\n").expect("written");
    let nowhere = scratch("no-folder").join("out.xyz");
    let folder = scratch("");
    for (arguments, reason) in [
        ([&model, &input, &output], "frame 1: potential: atom 0 is H"),
        ([&model, &missing, &output], "nothing.xyz"),
        ([&input, &input, &output], "in.xyz: "),
        ([&model, &far, &output], "far.xyz: frame 1: neighbours: the cell"),
        ([&missing, &unwritable, &output], "frame 0: the value of `note` has a quote"),
        ([&missing, &input, &nowhere], "no-folder is not there; make it first"),
        ([&missing, &input, &folder], "this is a folder; name a file"),
    ] {
        let run = predict(&arguments.map(PathBuf::as_path));
        let text = String::from_utf8_lossy(&run.stderr).into_owned();
        assert!(!run.status.success() && text.contains(reason), "{text}");
        assert!(!text.contains("panicked"), "{text}");
    }
    assert_eq!(std::fs::read_to_string(&output).expect("as it was"), "as it was");
}

#[test]
fn predict_by_tables() {
    let folder = Folder::new("tables-cli");
    let [model, input, output] = ["model.safetensors", "in.xyz", "out.xyz"].map(|name| folder.join(name));
    let full = calculator().potential();
    full.save(&model).expect("saved");
    let frame = frame(4, 2, 2.4);
    xyz::write(&input, std::slice::from_ref(&frame)).expect("written");
    let run = predict(&[&model, &input, &output, "--tables".as_ref()]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let calculator = Calculator::new(full.tabulate(Ponita::TABLE_POINTS).expect("tables"));
    assert_eq!(xyz::read(&output).expect("read"), [calculator.predict(&frame).expect("finite")]);
}
