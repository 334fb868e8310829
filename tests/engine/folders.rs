//! Atomic replacement of folders: the user's files are kept, and leftovers of killed processes are repaired.

use crate::support::folder::Folder;
use std::collections::BTreeMap;
use std::fs::{create_dir_all, read_to_string, rename, write};
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};
use tiebeam::files::{MANIFEST, check_folder, replace_folder};
use tiebeam::{Error, Result};

/// Replaces `out` by files with these contents.
fn put(out: &Path, files: &[(&str, &str)]) -> Result<()> {
    replace_folder(out, |new| {
        for (name, text) in files {
            create_dir_all(new.join(name).parent().unwrap()).unwrap();
            write(new.join(name), text).unwrap();
        }
        Ok(())
    })
}

/// All files below a folder, including links, by path.
fn tree(folder: &Path) -> BTreeMap<String, String> {
    fn add(folder: &Path, below: &str, all: &mut BTreeMap<String, String>) {
        for entry in folder.join(below).read_dir().unwrap().map(Result::unwrap) {
            let name = format!("{below}{}", entry.file_name().to_string_lossy());
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                add(folder, &format!("{name}/"), all);
                all.entry(format!("{name}/")).or_default();
            } else if kind.is_symlink() {
                all.insert(name, format!("-> {}", entry.path().read_link().unwrap().display()));
            } else {
                all.insert(name, read_to_string(entry.path()).unwrap());
            }
        }
    }
    let mut all = BTreeMap::new();
    add(folder, "", &mut all);
    all
}

/// [`tree`] without the manifest.
fn content(folder: &Path) -> BTreeMap<String, String> {
    let mut all = tree(folder);
    assert!(all.remove(MANIFEST).is_some(), "{all:?}");
    all
}

fn expect(folder: &Path, want: &[(&str, &str)]) {
    assert_eq!(content(folder), want.iter().map(|(n, t)| (n.to_string(), t.to_string())).collect());
}

fn refused<T>(result: Result<T>) -> String {
    result.err().expect("this is refused").to_string()
}

const FIRST: &[(&str, &str)] = &[("config", "one"), ("shard-1", "w1"), ("shard-2", "w2"), ("sub/inner", "i")];
const SECOND: &[(&str, &str)] = &[("config", "two"), ("weights", "w")];

#[test]
fn what_is_somebodys_is_kept() {
    let folder = Folder::new("kept");
    let out = folder.join("out");
    put(&out, FIRST).unwrap();
    // New files of the user, in new folders and in ours, and a file of ours that was changed and is not written again.
    let theirs = [("README.md", "mine"), ("adapters/a/x", "lora"), ("sub/theirs", "t"), ("shard-2", "W2")];
    for (name, text) in theirs {
        create_dir_all(out.join(name).parent().unwrap()).unwrap();
        write(out.join(name), text).unwrap();
    }
    create_dir_all(out.join("empty")).unwrap();
    check_folder(&out, ["config", "weights"]).unwrap();
    put(&out, SECOND).unwrap();
    let want: Vec<_> = SECOND.iter().chain(&theirs).copied().collect();
    let folders = ["adapters/", "adapters/a/", "sub/", "empty/"].map(|name| (name, ""));
    expect(&out, &[&want[..], &folders].concat());
    assert_eq!(folder.names(), ["out"]);
    // A second replacement: files that were carried over are still the user's.
    put(&out, FIRST).unwrap_err();
    write(out.join("shard-2"), "w2").unwrap();
    std::fs::remove_file(out.join("shard-2")).unwrap();
    put(&out, FIRST).unwrap();
    let theirs = &theirs[..3];
    expect(&out, &[FIRST, theirs, &folders].concat());
}

#[cfg(unix)]
#[test]
fn links_and_strange_names_are_kept_too() {
    use std::os::unix::ffi::OsStrExt;
    let folder = Folder::new("strange");
    let out = folder.join("out");
    put(&out, FIRST).unwrap();
    std::os::unix::fs::symlink("../elsewhere", out.join("link")).unwrap();
    let name = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    write(out.join(name), "raw").unwrap();
    // A file of ours is replaced by a link.
    std::fs::remove_file(out.join("shard-1")).unwrap();
    std::os::unix::fs::symlink("shard-2", out.join("shard-1")).unwrap();
    put(&out, SECOND).unwrap();
    let raw = String::from_utf8_lossy(b"\xff\xfe").into_owned();
    let theirs = [("link", "-> ../elsewhere"), (&raw, "raw"), ("shard-1", "-> shard-2")];
    expect(&out, &[SECOND, &theirs].concat());
}

#[test]
fn what_is_in_the_way_is_refused_by_name() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 4] = [
        ("config", |out| write(out.join("config"), "ONE").unwrap()),
        ("config", |out| write(out.join("config"), "one and more").unwrap()),
        ("weights", |out| write(out.join("weights"), "mine").unwrap()),
        ("weights", |out| create_dir_all(out.join("weights/x")).unwrap()),
    ];
    for (name, change) in changes {
        let folder = Folder::new("way");
        let out = folder.join("out");
        put(&out, FIRST).unwrap();
        write(out.join("README.md"), "mine").unwrap();
        change(&out);
        let before = tree(&out);
        for result in [check_folder(&out, ["config", "weights"]), put(&out, SECOND)] {
            let message = refused(result);
            let named = format!("{} is not as it was written here", out.join(name).display());
            assert!(message.contains(&named), "{message}");
        }
        assert_eq!((tree(&out), folder.names()), (before, vec!["out".to_string()]));
    }
}

/// Files that appear while the new folder is written are treated in the same way.
#[test]
fn what_comes_meanwhile_is_kept_or_refused() {
    let folder = Folder::new("meanwhile");
    let out = folder.join("out");
    put(&out, FIRST).unwrap();
    let during = |name: &str| {
        replace_folder(&out, |new| {
            write(new.join("config"), "two").unwrap();
            write(out.join(name), "mine").unwrap();
            Ok(())
        })
    };
    during("README.md").unwrap();
    expect(&out, &[("config", "two"), ("README.md", "mine")]);
    assert!(refused(during("config")).contains("config is not as it was written here"));
    expect(&out, &[("config", "mine"), ("README.md", "mine")]);
    // A folder that did not exist before.
    let other = folder.join("other");
    let made = replace_folder(&other, |_| {
        create_dir_all(&other).unwrap();
        write(other.join("x"), "mine").unwrap();
        Ok(())
    });
    assert!(refused(made).contains("it is not ours to replace"));
    assert_eq!((tree(&other).len(), folder.names()), (1, vec!["other".to_string(), "out".to_string()]));
}

#[test]
fn folders_of_others_are_refused() {
    let folder = Folder::new("foreign");
    let out = folder.join("out");
    create_dir_all(&out).unwrap();
    check_folder(&out, ["config"]).unwrap();
    put(&out, SECOND).unwrap();
    expect(&out, SECOND);
    std::fs::remove_file(out.join(MANIFEST)).unwrap();
    // A folder of an older version has no manifest, so every file in it may be the user's.
    for result in [check_folder(&out, ["x"]), put(&out, FIRST)] {
        let message = refused(result);
        assert!(message.contains("it is not ours to replace; name another folder"), "{message}");
    }
    write(out.join(MANIFEST), "{}").unwrap();
    assert!(refused(put(&out, FIRST)).contains(MANIFEST));
    assert_eq!(read_to_string(out.join("config")).unwrap(), "two");
    write(folder.join("file"), "x").unwrap();
    for bad in ["file", "no/such", "..", ""] {
        assert!(put(&folder.join(bad).join(""), FIRST).is_err() || bad.is_empty(), "{bad}");
        assert!(bad.is_empty() || check_folder(&folder.join(bad), ["x"]).is_err(), "{bad}");
    }
    assert_eq!(refused(put(Path::new(""), FIRST)), ": the path does not end in a folder's name");
    assert_eq!(folder.names(), ["file", "out"]);
}

#[test]
fn errors_leave_the_old_folder() {
    let folder = Folder::new("failed");
    let out = folder.join("out");
    let stop = |new: &Path| {
        write(new.join("half"), "x").unwrap();
        Err(Error::stopped("stopped"))
    };
    assert_eq!(refused(replace_folder(&out, stop)), "stopped");
    assert!(folder.names().is_empty());
    put(&out, FIRST).unwrap();
    let before = tree(&out);
    assert_eq!(refused(replace_folder(&out, stop)), "stopped");
    assert_eq!((tree(&out), folder.names()), (before, vec!["out".to_string()]));
}

#[test]
fn of_two_at_once_the_second_is_refused() {
    let folder = Folder::new("two");
    let out = folder.join("out");
    replace_folder(&out, |new| {
        write(new.join("a"), "first").unwrap();
        for result in [put(&out, SECOND), check_folder(&out, ["x"])] {
            assert!(refused(result).contains("is being written by another run"));
        }
        // The lock does not affect another folder beside it.
        put(&folder.join("other"), SECOND)
    })
    .unwrap();
    expect(&out, &[("a", "first")]);
    assert_eq!(folder.names(), ["other", "out"]);
}

/// Equal files give equal folders, whenever they were written.
#[test]
fn lists_hold_no_times() {
    let folder = Folder::new("equal");
    let [a, b] = ["a", "b"].map(|name| folder.join(name));
    put(&a, FIRST).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    put(&b, FIRST).unwrap();
    assert_eq!(tree(&a), tree(&b));
}

/// Large files with an unchanged time are not read. All others are read, and only their content counts.
#[test]
fn large_files_are_told_by_time_and_content() {
    let folder = Folder::new("large");
    let out = folder.join("out");
    let large = |fill: u8| vec![fill; (16 << 20) + 1];
    let again = || {
        replace_folder(&out, |new| {
            write(new.join("w"), large(1)).unwrap();
            Ok(())
        })
    };
    again().unwrap();
    let modified = |name: &str| out.join(name).metadata().unwrap().modified().unwrap();
    assert_eq!(modified("w"), modified(MANIFEST));
    again().unwrap();
    // A copy of the folder has other times but the same bytes.
    let touch = |name: &str, time| {
        let file = std::fs::File::options().write(true).open(out.join(name)).unwrap();
        file.set_modified(time).unwrap();
    };
    touch("w", SystemTime::now());
    touch(MANIFEST, SystemTime::UNIX_EPOCH);
    again().unwrap();
    let mut changed = large(1);
    changed[9 << 20] ^= 1;
    write(out.join("w"), changed).unwrap();
    assert!(refused(again()).contains("w is not as it was written here"));
}

#[cfg(unix)]
#[test]
fn links_owner_and_mode_of_a_folder_stay() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
    let folder = Folder::new("mode");
    create_dir_all(folder.join("disk")).unwrap();
    symlink("disk/real", folder.join("out")).unwrap();
    let (out, real) = (folder.join("out"), folder.join("disk/real"));
    put(&out, FIRST).unwrap();
    std::fs::set_permissions(&real, PermissionsExt::from_mode(0o2750)).unwrap();
    let owned = chown(&real, Some(4321), Some(8765)).is_ok();
    // With a trailing slash, as shells complete it.
    put(&out.join(""), SECOND).unwrap();
    let found = real.metadata().unwrap();
    assert!(out.is_symlink() && !real.is_symlink());
    assert_eq!(found.mode() & 0o777, 0o750);
    assert!(!owned || (found.uid(), found.gid()) == (4321, 8765));
    expect(&real, SECOND);
    assert_eq!(
        (folder.names(), crate::support::folder::names(&folder.join("disk"))),
        (vec!["disk".into(), "out".into()], vec!["real".into()])
    );
    let long = folder.join("n".repeat(255));
    put(&long, FIRST).unwrap();
    put(&long, SECOND).unwrap();
    expect(&long, SECOND);
}

/// Builds every state that a killed process can leave. The names contain ids of processes that do not exist.
#[test]
fn every_state_that_a_kill_leaves_is_mended() {
    let folder = Folder::new("states");
    let [out, new, old] = ["out", ".out.4194999.tmp", ".out.4194999.old"].map(|name| folder.join(name));
    let fresh = || {
        for name in folder.names() {
            std::fs::remove_dir_all(folder.join(name)).unwrap();
        }
        put(&out, FIRST).unwrap();
        write(out.join("README.md"), "mine").unwrap();
        create_dir_all(out.join("adapters")).unwrap();
        write(out.join("adapters/x"), "lora").unwrap();
    };
    let theirs = [("README.md", "mine"), ("adapters/", ""), ("adapters/x", "lora")];
    let with = |files: &[(&'static str, &'static str)]| [files, &theirs].concat();
    let sub = [("sub/", "")];
    let ended = |what: &str| {
        put(&out, SECOND).unwrap_or_else(|e| panic!("{what}: {e}"));
        expect(&out, &with(SECOND));
        assert_eq!(folder.names(), ["out"], "{what}");
    };

    let behind = || {
        // The new folder is made elsewhere, because a call for `out` would first restore the old folder.
        put(&folder.join("elsewhere"), SECOND).unwrap();
        rename(&out, &old).unwrap();
        rename(folder.join("elsewhere"), &out).unwrap();
    };

    // Six processes were killed while they wrote the new folder. The lock's file is left too.
    fresh();
    for i in 0..6 {
        create_dir_all(folder.join(format!(".out.{}.tmp/sub", 4194300 + i))).unwrap();
        write(folder.join(format!(".out.{}.tmp/w", 4194300 + i)), "half").unwrap();
    }
    write(folder.join(".out.tiebeam-lock"), "").unwrap();
    check_folder(&out, ["config"]).unwrap();
    assert_eq!(folder.names(), ["out"]);
    expect(&out, &[&with(FIRST)[..], &sub].concat());
    ended("writing");

    // Killed between the two renames. The old folder is restored before the work begins, even if the work fails.
    fresh();
    rename(&out, &old).unwrap();
    put(&new, SECOND).unwrap();
    check_folder(&out, ["config"]).unwrap();
    expect(&out, &[&with(FIRST)[..], &sub].concat());
    assert_eq!(folder.names(), ["out"]);
    ended("between the renames");
    // The same, but the user has created the folder again.
    fresh();
    rename(&out, &old).unwrap();
    create_dir_all(&out).unwrap();
    ended("an empty folder");

    // Killed after the renames, with none, some or all of the user's files moved, and with a part of the rest removed.
    for moved in 0..4 {
        fresh();
        behind();
        let mine = ["README.md", "adapters"];
        mine.iter().take(moved).for_each(|name| rename(old.join(name), out.join(name)).unwrap());
        if moved == 3 {
            rename(&old, &new).unwrap();
            std::fs::remove_file(new.join("config")).unwrap();
            std::fs::remove_file(new.join(MANIFEST)).unwrap();
        }
        check_folder(&out, ["config"]).unwrap();
        expect(&out, &with(SECOND));
        assert_eq!(folder.names(), ["out"]);
        ended("behind the renames");
    }

    // A file that cannot be moved is not lost, and the error names it.
    fresh();
    behind();
    write(out.join("README.md"), "another").unwrap();
    let message = refused(put(&out, SECOND));
    assert!(message.contains(".out.4194999.old/README.md"), "{message}");
    assert_eq!(read_to_string(old.join("README.md")).unwrap(), "mine");
    assert_eq!(read_to_string(out.join("README.md")).unwrap(), "another");
    std::fs::remove_file(out.join("README.md")).unwrap();
    ended("named");

    // Folders with similar names stay.
    fresh();
    let others = [".out.1a.tmp", ".out.1.tmp.x", ".out2.1.tmp", ".out.1-2.tmp", "out.1.tmp"];
    others.iter().for_each(|name| create_dir_all(folder.join(name)).unwrap());
    write(folder.join(".out.5.tmp"), "a file").unwrap();
    put(&out, SECOND).unwrap();
    assert_eq!(folder.names().len(), 7);
    std::fs::remove_file(folder.join(".out.5.tmp")).unwrap();
}

const CHILD: &str = "TIEBEAM_TEST_FOLDER";

/// Processes that only replace a folder are killed at random moments. The folder is always complete, and no file of the user is
/// lost.
#[test]
fn killed_at_any_moment() {
    if let Some(out) = std::env::var_os(CHILD) {
        for i in 0.. {
            let files: Vec<(String, String)> = (0..6).map(|f| (format!("f{f}"), i.to_string())).collect();
            let files: Vec<(&str, &str)> = files.iter().map(|(n, t)| (n.as_str(), t.as_str())).collect();
            put(Path::new(&out), &files).unwrap();
            // Ends when its parent has been killed.
            if writeln!(std::io::stdout(), "\nround").is_err() {
                return;
            }
        }
    }
    let folder = Folder::new("kills");
    let out = folder.join("out");
    let mut states = std::collections::BTreeSet::new();
    for kill in 0..60u64 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["folders::killed_at_any_moment", "--exact", "--nocapture"])
            .env(CHILD, &out)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(said.any(|line| line.unwrap() == "round"));
        std::thread::sleep(Duration::from_micros(kill * 7919 % 10_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let kinds = |name: &String| name.rsplit('.').next().unwrap().to_string();
        states.insert(folder.names().iter().map(kinds).collect::<Vec<_>>());
        check_folder(&out, ["f0"]).unwrap();
        assert_eq!(folder.names(), ["out"]);
        let mut all = content(&out);
        for user in 0..kill {
            assert_eq!(all.remove(&format!("user-{user}")), Some(user.to_string()), "after kill {kill}");
        }
        assert_eq!(all.len(), 6, "{all:?}");
        assert!(all.values().all(|text| Some(text) == all.get("f0")), "one version: {all:?}");
        write(out.join(format!("user-{kill}")), kill.to_string()).unwrap();
    }
    assert!(states.len() > 1, "kills met only {states:?}");
}
