//! What all commands have in common: where results and remarks go, exit statuses, closed pipes, logs.

use crate::support::folder::Folder;
use crate::support::potentials::{calculator, frame};
use crate::{command, text};
use std::io::Write;
use std::process::{Output, Stdio};
use tiebeam::geometry::xyz;

fn run(args: &[&str]) -> Output {
    command().args(args).env_remove("RUST_LOG").output().expect("the binary runs")
}

fn lines(bytes: &[u8]) -> Vec<serde_json::Value> {
    let line = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
    text(bytes).lines().map(line).collect()
}

#[test]
fn exit_statuses() {
    for (args, status) in [
        (&["adapters"][..], 0),
        (&["--help"], 0),
        (&["help", "merge"], 0),
        (&["adapters", "--no-such-option"], 2),
        (&["no-such-command"], 2),
        (&["adapters", "--memory", "much"], 2),
        (&["merge", "no-such-file.yaml", "--out", "x"], 1),
        (&["tune", "--gpu", "no such adapter"], 1),
    ] {
        let done = run(args);
        assert_eq!(done.status.code(), Some(status), "{args:?}: {done:?}");
        // Drivers may print there too.
        assert_eq!(text(&done.stderr).contains("error:"), status != 0, "{args:?}: {done:?}");
    }
}

#[test]
fn lines_go_to_stdout_or_into_a_file() {
    let folder = Folder::new("lines");
    let table = run(&["adapters"]);
    let piped = run(&["adapters", "--json"]);
    let found = lines(&piped.stdout);
    assert!(
        !found.is_empty() && found.iter().all(|line| line["line"] == "adapter" && line["name"].is_string())
    );
    // The table is on stderr then, and -q leaves it out.
    let shown = text(&table.stdout);
    assert!(!shown.is_empty() && text(&piped.stderr).contains(&shown));
    let quiet = run(&["adapters", "--json", "-q"]);
    assert!(!text(&quiet.stderr).contains(&shown) && quiet.stdout == piped.stdout);
    let file = folder.join("adapters.jsonl");
    let kept = run(&["adapters", &format!("--json={}", file.display())]);
    assert_eq!(kept.stdout, table.stdout);
    assert_eq!(std::fs::read(&file).expect("written"), piped.stdout);
    // A command that fails leaves an earlier file as it was.
    let failed = run(&["merge", "no-such-file.yaml", "--out", "x", &format!("--json={}", file.display())]);
    assert!(!failed.status.success());
    assert_eq!(std::fs::read(&file).expect("kept"), piped.stdout);
    assert_eq!(folder.names(), ["adapters.jsonl"]);
}

#[test]
fn lines_replace_nothing_else() {
    let folder = Folder::new("kept-files");
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    };
    let config = file("merge.yaml", "merge_method: average\nmodels: [{model: a}]\n");
    let lines = run(&["adapters", "--json"]).stdout;
    let other = file("other.jsonl", &text(&lines));
    let part = file("other.jsonl.part", &text(&lines));
    let into = |file: &str| format!("--json={file}");
    for (args, reason) in [
        // A file that has something else.
        (vec!["merge", &config, "--dry-run", &into(&config)], "this file has no JSON lines"),
        // A file that is read, or its part.
        (vec!["bench", "compare", &other, "--html", "-", &into(&other)], "a file that is read"),
        (vec!["bench", "compare", &part, "--html", "-", &into(&other)], "a file that is read"),
        // A run that measured nothing.
        (vec!["bench", "no such row", &into(&other)], "no row's name"),
        (vec!["tune", "--minutes=-1"], "0 or more"),
    ] {
        let done = command().args(&args).current_dir(&*folder).output().expect("it runs");
        let said = text(&done.stderr);
        assert!(!done.status.success() && said.contains(reason), "{args:?}: {said}");
        assert_eq!(std::fs::read(&other).expect("kept"), lines, "{args:?}");
        assert_eq!(std::fs::read(&part).expect("kept"), lines, "{args:?}");
        assert!(std::fs::read_to_string(&config).expect("kept").starts_with("merge_method"), "{args:?}");
    }
    // Nothing is measured where there is no adapter, and an earlier file stays.
    if !cfg!(target_os = "macos") {
        let args = ["bench", "--gpu", "all", &into(&other)];
        let none = command().args(args).env("TIEBEAM_BACKEND", "metal").output().expect("it runs");
        assert_eq!(none.status.code(), Some(1), "{none:?}");
        assert_eq!(std::fs::read(&other).expect("kept"), lines);
    }
}

#[test]
fn stdin_is_read_once() {
    let committed = crate::support::folder::root().join("benches/results/lavapipe-22.3.6-epyc-2-cores.jsonl");
    let from = |args: &[&str]| {
        let file = std::fs::File::open(&committed).expect("a file of the repository");
        command().args(["bench", "compare"]).args(args).stdin(file).output().expect("it runs")
    };
    let page = from(&["-", "--html", "-"]);
    assert!(page.status.success() && text(&page.stdout).contains("<svg"), "{}", text(&page.stderr));
    let twice = from(&["-", "-", "--html", "-"]);
    assert!(!twice.status.success() && text(&twice.stderr).contains("stdin can be read once"), "{twice:?}");
    let rows = from(&["-", "--html", "-", "--json"]);
    assert!(!rows.status.success() && text(&rows.stderr).contains("cannot both go to stdout"), "{rows:?}");
}

#[test]
fn the_doctor_examines_every_adapter() {
    let done = run(&["doctor", "--json"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let found = lines(&done.stdout);
    let adapters: Vec<_> = found.iter().filter(|line| line["line"] == "adapter").collect();
    assert_eq!(adapters.len(), tiebeam::Gpu::adapters().expect("listed").len());
    assert!(adapters.iter().any(|line| line["works"] == true && line["chosen"] == true), "{adapters:?}");
    assert_eq!(found[0]["line"], "host");
    let said = text(&done.stderr);
    assert!(said.contains("works   a product and a sum are right"), "{said}");
    // Features that are switched off are named, with what is lost.
    let off = command().arg("doctor").env("TIEBEAM_OFF", "f16").output().expect("the binary runs");
    let said = text(&off.stdout);
    assert!(
        said.contains("without f16: no arithmetic in half precision") && said.contains("TIEBEAM_OFF=f16"),
        "{said}"
    );
    let none = command().arg("doctor").env("TIEBEAM_BACKEND", "metal").output().expect("the binary runs");
    if !cfg!(target_os = "macos") {
        assert_eq!(none.status.code(), Some(1), "{none:?}");
        let said = text(&none.stdout);
        assert!(said.contains("TIEBEAM_BACKEND can hide adapters"), "{none:?}");
        assert!(text(&none.stderr).contains("no GPU adapter"), "{none:?}");
    }
}

#[test]
fn a_closed_pipe_ends_the_command_quietly() {
    for args in [&["adapters"][..], &["doctor"], &["completions", "bash"]] {
        // The reader has gone away before anything is written.
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let done = command().args(args).stdout(writer).output().expect("the binary runs");
        let (status, said) = (done.status, text(&done.stderr));
        assert!(status.code() == Some(141), "{args:?}: {status}");
        assert!(!said.contains("panicked") && !said.contains("error:"), "{args:?}: {said}");
    }
}

#[test]
fn text_comes_from_stdin_and_goes_to_stdout() {
    let folder = Folder::new("standard");
    let [model, input, output] = ["model.safetensors", "in.xyz", "out.xyz"].map(|name| folder.join(name));
    calculator().potential().save(&model).expect("saved");
    xyz::write(&input, &[frame(7, 2, 2.4)]).expect("written");
    let named = command().arg("predict").args([&model, &input, &output]).output().expect("the binary runs");
    assert!(named.status.success(), "{named:?}");
    let mut child = command()
        .args(["predict".as_ref(), model.as_os_str(), "-".as_ref(), "-".as_ref()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let frames = std::fs::read(&input).expect("read");
    child.stdin.take().expect("a pipe").write_all(&frames).expect("written");
    let piped = child.wait_with_output().expect("it ends");
    assert!(piped.status.success(), "{piped:?}");
    assert_eq!(piped.stdout, std::fs::read(&output).expect("read"));
    assert!(text(&piped.stderr).contains("1 frames predicted"), "{piped:?}");
    let both = ["predict".as_ref(), model.as_os_str(), input.as_os_str(), "-".as_ref(), "--json".as_ref()];
    let both = command().args(both).output().expect("the binary runs");
    assert!(!both.status.success() && text(&both.stderr).contains("cannot both go to stdout"), "{both:?}");
}

#[test]
fn memory_has_a_cap() {
    let folder = Folder::new("cap");
    let [model, input, output] = ["model.safetensors", "in.xyz", "out.xyz"].map(|name| folder.join(name));
    calculator().potential().save(&model).expect("saved");
    xyz::write(&input, &[frame(7, 2, 2.4)]).expect("written");
    let predict = |memory: &str| {
        let files = [&model, &input, &output];
        command().arg("predict").args(files).args(["--memory", memory]).output().expect("the binary runs")
    };
    let small = predict("10KB");
    let said = text(&small.stderr);
    assert!(!small.status.success() && said.contains("at most 9.8 KiB are allowed"), "{said}");
    assert!(!output.exists());
    assert!(predict("1GB").status.success());
}

#[test]
fn warnings_are_shown() {
    let folder = Folder::new("warnings");
    // A file of measured choices that cannot be read causes a warning.
    let tuned = |cache: &std::path::Path| {
        let mut command = command();
        command.env("TIEBEAM_CACHE", cache).env_remove("TIEBEAM_DEVICE").env_remove("RUST_LOG");
        command
    };
    let done = tuned(&folder).args(["tune", "--minutes", "0"]).output().expect("the binary runs");
    assert!(done.status.success() && text(&done.stderr).contains("--minutes"), "{done:?}");
    let kept = folder.names().into_iter().find(|name| name.starts_with("kernels-")).expect("kept");
    std::fs::write(folder.join(kept), "not choices").expect("written");
    let warned = tuned(&folder).args(["doctor"]).env("RUST_LOG", "").output().expect("the binary runs");
    let said = text(&warned.stderr);
    assert_eq!(said.matches("WARN measured choices left out").count(), 1, "{said:?}");
    let quiet = tuned(&folder).args(["doctor", "-q"]).output().expect("the binary runs");
    assert!(!text(&quiet.stderr).contains("WARN"), "{quiet:?}");
    assert!(text(&quiet.stdout).contains("from the built-in tables"), "{quiet:?}");
    let verbose = tuned(&folder).args(["doctor", "-v"]).env("RUST_LOG", "error").output();
    let verbose = verbose.expect("the binary runs");
    assert!(text(&verbose.stderr).contains("INFO tiebeam::gpu::open: opened"), "{verbose:?}");
}

#[test]
fn completions_and_manual_pages() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let done = run(&["completions", shell]);
        assert!(done.status.success() && text(&done.stdout).contains("barrier"), "{shell}: {done:?}");
    }
    let folder = Folder::new("man");
    let pages = folder.join("pages");
    assert!(run(&["man", pages.to_str().expect("a path of the test")]).status.success());
    let merge = std::fs::read_to_string(pages.join("tiebeam-merge.1")).expect("a page of each command");
    assert!(merge.contains("tiebeam merge merge.yaml") && merge.contains("\\-\\-gpu"), "{merge}");
}
