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

/// Compares frames whose results may differ by f32 rounding, because frames of a file share graphs.
fn assert_close(got: &[Frame], want: &[Frame]) {
    let without: [Vec<Frame>; 2] = [got, want].map(|all| all.iter().map(Frame::without_results).collect());
    assert_eq!(without[0], without[1]);
    let numbers = |f: &Frame| -> Vec<f64> {
        let all = f.forces.iter().flatten().flatten().chain(f.stress.iter().flatten().flatten());
        all.chain(&f.energy).copied().collect()
    };
    for (i, (got, want)) in got.iter().map(numbers).zip(want.iter().map(numbers)).enumerate() {
        assert_eq!(got.len(), want.len(), "frame {i}");
        assert!(
            got.iter().zip(&want).all(|(g, w)| (g - w).abs() < 1e-5),
            "frame {i}: {got:?}, alone {want:?}"
        );
    }
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
    assert_close(&xyz::read(&output).expect("read"), &want);
    assert!(want[1].stress.is_some() && want[0].stress.is_none());
    let average = Calculator::new(calculator().potential().clone()).rotations(2);
    let want: Vec<Frame> = frames.iter().map(|f| average.predict(f).expect("finite")).collect();
    let options = ["--rotations", "2"].map(std::path::Path::new);
    let run = predict(&[&model, &input, &output, options[0], options[1]]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_close(&xyz::read(&output).expect("read"), &want);
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
    let [far, malformed] = ["far.xyz", "malformed.xyz"].map(scratch);
    let apart =
        Frame { species: vec![8, 29], positions: vec![[0.0; 3], [1e300, 0.0, 0.0]], ..Frame::default() };
    let flat = Cell { vectors: [[0.0; 3]; 3], periodic: [true; 3] };
    let flat = Frame { cell: Some(flat), ..frame(7, 1, 2.4) };
    xyz::write(&far, &[apart, flat]).expect("written");
    std::fs::write(&malformed, "1\nProperties=species:S:1:pos:R:3 note={a\nCu 0 0 0\n").expect("written");
    let nowhere = scratch("no-folder").join("out.xyz");
    let folder = scratch("");
    for (arguments, reason) in [
        ([&model, &input, &output], "frame 1: potential: atom 0 is H"),
        ([&model, &missing, &output], "nothing.xyz"),
        ([&input, &input, &output], "in.xyz: "),
        ([&model, &far, &output], "far.xyz: frame 1: neighbours: the cell"),
        ([&missing, &malformed, &output], "line 2: the value of `note` has no closing"),
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

/// Many small frames and one that is larger than a batch come out in order, from a file and through pipes, with the columns and keys
/// that no field takes, and the comparison with labels under any name.
#[test]
fn predict_streams_and_keeps_what_it_does_not_know() {
    let folder = Folder::new("stream");
    let [model, input, output] = ["model.safetensors", "in.xyz", "out.xyz"].map(|name| folder.join(name));
    calculator().potential().save(&model).expect("saved");
    let mut all = String::new();
    for i in 0..300 {
        let (n, name) = if i == 200 { (1100, "large") } else { (i % 5, "small") };
        all += &format!(
            "{n}\nProperties=species:S:1:tag:I:1:pos:R:3:dft_forces:R:3 dft_energy={i} kind={name} free_energy=7\n"
        );
        for k in 0..n {
            let (x, y, z) = (2.5 * (k % 11) as f64, 2.4 * (k / 11 % 10) as f64, 2.6 * (k / 110) as f64);
            all += &format!("{} 0{k} {x} {y} {z} 1 2 -3.50\n", if k % 2 == 0 { "Cu" } else { "o" });
        }
    }
    std::fs::write(&input, &all).expect("written");
    let run = predict(&[&model, &input, &output]);
    let (said, result) = (text(&run.stderr), text(&run.stdout));
    assert!(run.status.success(), "{said}");
    assert!(
        said.contains(
            "energy in the input: `free_energy` found in 300 and not used; `dft_energy` used in 300"
        ) || said.contains(
            "energy in the input: `dft_energy` used in 300 of 300; `free_energy` found in 300 and not used"
        ),
        "{said}"
    );
    assert!(said.contains("forces in the input: `dft_forces` used in 300 of 300"), "{said}");
    assert!(
        result.contains("300 frames predicted")
            && result.contains("energy MAE")
            && result.contains("force MAE"),
        "{result}"
    );
    let frames = xyz::read(&output).expect("read");
    let given = xyz::parse(&all).expect("frames");
    assert_eq!(frames.len(), 300);
    let want: Vec<Frame> = given.iter().map(|f| calculator().predict(f).expect("finite")).collect();
    assert_close(&frames, &want);
    assert!(frames[4].other["dft_energy"] == "4" && !frames[4].other.contains_key("free_energy"));
    let columns = &frames[4].columns;
    assert_eq!((columns[0].rows[3].as_str(), columns[1].rows[3].as_str()), ("03", "1 2 -3.50"));
    // Another name of the label, and a name that is not there.
    let more = ["--energy-key", "free_energy", "--forces-key", "nothing"].map(std::path::Path::new);
    let run = predict(&[&model, &input, &output, more[0], more[1], more[2], more[3]]);
    assert!(text(&run.stderr).contains("`free_energy` used in 300 of 300"), "{}", text(&run.stderr));
    assert!(text(&run.stderr).contains("no frame of the input has `nothing`"), "{}", text(&run.stderr));
    assert!(!text(&run.stdout).contains("force MAE"), "{}", text(&run.stdout));
    // A pipe gives the bits of a file. A file may replace itself.
    let whole = std::fs::read(&output).expect("written");
    let mut child = command()
        .args(["predict".as_ref(), model.as_os_str(), "-".as_ref(), "-".as_ref()])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the command runs");
    let mut stdin = child.stdin.take().expect("a pipe");
    let text_of_all = all.clone();
    let writer = std::thread::spawn(move || std::io::Write::write_all(&mut stdin, text_of_all.as_bytes()));
    let piped = child.wait_with_output().expect("it ends");
    writer.join().expect("no panic").expect("it was read");
    assert!(piped.stdout == whole, "{} and {} bytes", piped.stdout.len(), whole.len());
    assert!(predict(&[&model, &input, &input]).status.success());
    assert!(std::fs::read(&input).expect("written") == whole);
    // What is wrong at the end is found at the end, and the output is as it was.
    std::fs::write(&input, all + "1\n\nCu 0 0\n").expect("written");
    let run = predict(&[&model, &input, &output]);
    assert!(!run.status.success() && text(&run.stderr).contains("3 columns"), "{}", text(&run.stderr));
    assert!(std::fs::read(&output).expect("kept") == whole);
    assert_eq!(folder.names(), ["in.xyz", "model.safetensors", "out.xyz"]);
}

#[test]
fn predict_says_when_atoms_are_too_near() {
    let folder = Folder::new("near");
    let [model, input, output] = ["model.safetensors", "in.xyz", "out.xyz"].map(|name| folder.join(name));
    calculator().potential().save(&model).expect("saved");
    let pair = |z: f64| format!("2\nProperties=species:S:1:pos:R:3\nCu 0 0 0\nCu 0 0 {z}\n");
    std::fs::write(&input, pair(2.5) + &pair(0.5) + &pair(0.7)).expect("written");
    let run = predict(&[&model, &input, &output]);
    let said = text(&run.stderr);
    assert!(run.status.success(), "{said}");
    assert!(
        said.contains("frame 1: atoms 0 and 1 are 0.500 A apart, nearer than any")
            && said.contains("2 such frames"),
        "{said}"
    );
    let before = std::fs::read(&output).expect("written");
    std::fs::write(&input, pair(2.5) + &pair(0.0)).expect("written");
    let run = predict(&[&model, &input, &output]);
    let said = text(&run.stderr);
    assert!(
        !run.status.success() && said.contains("in.xyz: frame 1: atoms 0 and 1 are at one point"),
        "{said}"
    );
    assert!(std::fs::read(&output).expect("kept") == before);
}

/// Ctrl-C ends with the status of a stop and leaves the output.
#[cfg(unix)]
#[test]
fn predict_stops() {
    let folder = Folder::new("stop");
    let [model, output] = ["model.safetensors", "out.xyz"].map(|name| folder.join(name));
    calculator().potential().save(&model).expect("saved");
    std::fs::write(&output, "as it was").expect("written");
    let mut child = command()
        .args(["predict".as_ref(), model.as_os_str(), "-".as_ref(), output.as_os_str()])
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the command runs");
    let mut stdin = child.stdin.take().expect("a pipe");
    // The command reads more than a batch only when it works, which is after it waits for Ctrl-C.
    let frame = "1\nnote=x\nCu 0 0 0\n".repeat(20_000);
    std::io::Write::write_all(&mut stdin, frame.as_bytes()).expect("it reads");
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.expect("kill runs").success());
    // It goes on reading until it looks at the flag.
    let _ = std::io::Write::write_all(&mut stdin, frame.as_bytes());
    drop(stdin);
    let run = child.wait_with_output().expect("it ends");
    assert_eq!(run.status.code(), Some(130), "{}", text(&run.stderr));
    assert!(text(&run.stderr).contains("stopped; nothing was written"), "{}", text(&run.stderr));
    assert_eq!(std::fs::read_to_string(&output).expect("kept"), "as it was");
    assert_eq!(folder.names(), ["model.safetensors", "out.xyz"]);
}

/// Ctrl-C is looked at between the graphs of a batch, and output that went to stdout is said to be there.
#[cfg(unix)]
#[test]
fn predict_stops_within_a_batch() {
    let folder = Folder::new("stop-within");
    let model = folder.join("model.safetensors");
    calculator().potential().save(&model).expect("saved");
    let mut child = command()
        .args(["predict".as_ref(), model.as_os_str(), "-".as_ref(), "-".as_ref()])
        .args(["--rotations", "1000000"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the command runs");
    // A first batch of frames without atoms is done at once, and the second takes for ever.
    let frames = "0\nnote=x\n".repeat(1024) + &"1\nnote=x\nCu 0 0 0\n".repeat(4096);
    let mut stdin = child.stdin.take().expect("a pipe");
    let writer = std::thread::spawn(move || std::io::Write::write_all(&mut stdin, frames.as_bytes()));
    // The first frames on stdout show that it works and waits for Ctrl-C.
    let mut stdout = child.stdout.take().expect("a pipe");
    let mut first = [0; 64];
    std::io::Read::read_exact(&mut stdout, &mut first).expect("frames");
    let rest = std::thread::spawn(move || std::io::Read::read_to_end(&mut stdout, &mut Vec::new()));
    std::thread::sleep(std::time::Duration::from_secs(1));
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.expect("kill runs").success());
    let since = std::time::Instant::now();
    let run = child.wait_with_output().expect("it ends");
    assert!(since.elapsed().as_secs() < 30, "{:?}", since.elapsed());
    assert_eq!(run.status.code(), Some(130), "{}", text(&run.stderr));
    assert!(
        text(&run.stderr).contains("stopped; the 1024 frames that were predicted until then were written"),
        "{}",
        text(&run.stderr)
    );
    let _ = (writer.join(), rest.join());
    let run =
        command().args(["predict", "a", "b", "c", "--rotations", "4294967295"]).output().expect("it runs");
    assert!(!run.status.success() && text(&run.stderr).contains("1000000"), "{}", text(&run.stderr));
}

/// Labels need not be good for a prediction. Scripts learn which were used, and what has no successor is named.
#[test]
fn predict_needs_no_labels() {
    let folder = Folder::new("labels");
    let [model, input, output] = ["model.safetensors", "in.xyz", "out.xyz"].map(|name| folder.join(name));
    calculator().potential().save(&model).expect("saved");
    let slab = "Lattice=\"8 0 0 0 8 0 0 0 20\" pbc=\"T T F\" stress=\"1 0 0 0 2 0 0 0 3\" Virial=\"1 0 0 0 1 0 0 0 1\"";
    let frame = |keys: &str, columns: &str, row: &str| {
        format!("2\nProperties=species:S:1:pos:R:3{columns} {keys}\nCu 0 0 0 {row}\nCu 0 0 2.5 {row}\n")
    };
    let all = frame("energy=-1", ":forces:R:3", "1 2 3")
        + &frame("energy=nan force=0.5", ":forces:R:3", "nan nan nan")
        + &frame("virial=\"1 2 3 4 5 6\"", ":forces:I:3", "0 0 0")
        + &frame(slab, ":local_energy:R:1:x:R:2", "1 2 3");
    std::fs::write(&input, &all).expect("written");
    let names = ["--json", "--stress-key", "nothere"].map(std::path::Path::new);
    let run = predict(&[&model, &input, &output, names[0], names[1], names[2]]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let said = text(&run.stderr);
    for words in
        ["no frame of the input has `nothere`", "stress or virial of 2 frames was left out", "`forces:I:3`"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
    let lines: Vec<serde_json::Value> =
        text(&run.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let labels = lines.iter().find(|line| line["line"] == "labels").expect("a line of labels");
    assert_eq!((&labels["missing"][0], &labels["stresses_left_out"]), (&"nothere".into(), &2.into()));
    let energy = labels["found"].as_array().expect("names").iter().find(|l| l["name"] == "energy");
    assert_eq!(energy.expect("an energy")["used"], 1, "{labels}");
    let frames = xyz::read(&output).expect("read");
    assert!(frames.iter().all(|f| f.energy.is_some() && f.forces.is_some() && f.stress.is_none()));
    let others: Vec<Vec<&str>> =
        frames.iter().map(|f| f.other.keys().map(String::as_str).collect()).collect();
    assert_eq!(others, [vec![], vec!["force"], vec![], vec![]]);
    assert_eq!(frames[3].columns.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["x"]);
}

/// A frame that is too large for the memory is named.
#[test]
fn predict_names_a_frame_that_is_too_large() {
    let folder = Folder::new("memory");
    let [model, input, output] = ["model.safetensors", "in.xyz", "out.xyz"].map(|name| folder.join(name));
    calculator().potential().save(&model).expect("saved");
    let mut large = frame(3, 12, 2.4);
    (large.energy, large.forces) = (None, None);
    xyz::write(&input, &[frame(1, 1, 2.4), frame(2, 1, 2.4), large]).expect("written");
    let more = ["--memory", "1MB"].map(std::path::Path::new);
    let run = predict(&[&model, &input, &output, more[0], more[1]]);
    let said = text(&run.stderr);
    assert!(!run.status.success() && said.contains("in.xyz: frame 2: ") && said.contains("memory"), "{said}");
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
    assert_close(&xyz::read(&output).expect("read"), &[calculator.predict(&frame).expect("finite")]);
}
