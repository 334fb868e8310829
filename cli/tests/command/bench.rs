//! `tiebeam bench` and `tiebeam tune`.

use crate::support::folder::Folder;
use crate::{command, text};
use tiebeam::bench::{Part, Record, read_runs};

#[test]
fn the_command_writes_what_it_measures_and_says_what_chose_the_kernels() {
    let folder = Folder::new("bench_command");
    let (json, cache) = (folder.join("mine.jsonl"), folder.join("cache"));
    let run = |words: &[&str]| {
        let mut command = command();
        // With a named class, nothing would be measured.
        command.args(words).env("TIEBEAM_CACHE", &cache).env_remove("TIEBEAM_DEVICE");
        command.output().expect("the command")
    };
    let json = json.to_str().expect("a path of the test");
    let done = run(&["bench", "sum 1048576", &format!("--json={json}")]);
    assert!(done.status.success(), "{done:?}");
    let measured = read_runs(json.as_ref()).expect("lines");
    assert_eq!(measured[0].records.iter().map(Record::name).collect::<Vec<_>>(), ["sum 1048576"]);
    assert!(!measured[0].host.tuned && !measured[0].host.class.is_empty(), "{:?}", measured[0].host);
    assert!(!Part::beside(json.as_ref()).exists());
    // Only the device's own numbers are measured, stored and exported. A class of products would take a minute to compile on a
    // CPU driver.
    let export = folder.join("choices.txt");
    let done = run(&["tune", "--minutes", "0", "--export", export.to_str().expect("a path of the test")]);
    let said = text(&done.stderr);
    assert!(done.status.success() && said.contains("--minutes gives it more"), "{done:?}");
    let choices = std::fs::read_to_string(&export).expect("exported");
    assert!(choices.contains("\ndevice flops_s = "), "{choices}");
    let done = run(&["bench", "no such row", &format!("--json={json}")]);
    assert!(!done.status.success(), "no row has this name");
    assert_eq!(read_runs(json.as_ref()).expect("the older lines").len(), 1);
}
