//! Guarantees of the benchmark: a wrong result has no time, a failing row does not stop others, and no line is lost.

use crate::support::folder::{Folder, root};
use crate::support::gpu;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;
use tiebeam::bench::{
    Baseline, Ceilings, Check, Entry, Event, Part, Row, Run, Settings, Suite, entries, kernels, markdown,
    page, plan, read_runs, run,
};
use tiebeam::{Error, Gpu, Result, Tensor};

/// A row that doubles 65536 ones, with an expected value.
fn double(name: &str, want: f64) -> Entry {
    Entry::new("double", name, move |gpu| {
        let x = Tensor::ones(gpu, [1 << 16]);
        let checks = vec![Check { at: 7, want, bound: 0.0 }];
        Ok(Row { checks, ..Row::new([8.0 * 65536.0, 0.0], move |_| x.affine(2.0, 0.0)) })
    })
}

/// Ceilings that no row reaches.
fn far() -> Ceilings {
    Ceilings { copy: Some(1e18), kernel_copy: Some(1e18), fma32: Some(1e18), ..Ceilings::default() }
}

fn settings(ceilings: Ceilings) -> Settings {
    Settings { ceilings: Some(ceilings), ..Settings::new(Duration::ZERO) }
}

/// Makes a run. Returns it with the lines that it would write.
fn went(gpu: &Gpu, entries: Vec<Entry>, settings: &Settings) -> (Run, Vec<String>) {
    let mut lines = Vec::new();
    let run = run(gpu.clone(), entries, settings, &mut |event| {
        lines.extend(event.to_json().map(|line| line.to_string()));
        Ok(())
    });
    (run.expect("the loop ends whatever a row does"), lines)
}

/// Writes the lines to a file and reads it.
fn again(folder: &Folder, lines: &[String]) -> Vec<Run> {
    let path = folder.join("run.jsonl");
    std::fs::write(&path, lines.join("\n") + "\n").expect("a file");
    read_runs(&path).expect("our own lines")
}

fn names(run: &Run) -> Vec<String> {
    run.records.iter().map(tiebeam::bench::Record::name).collect()
}

#[test]
fn a_right_result_has_a_time() {
    let (run, _) = went(gpu(), vec![double("a", 2.0)], &settings(far()));
    let record = &run.records[0];
    assert!(record.median_ms > 0.0 && record.min_ms <= record.median_ms && record.median_ms <= record.max_ms);
    assert!(record.fraction.is_some_and(|f| f > 0.0 && f < 1.0), "{:?}", record.fraction);
    assert!(run.verdict().is_ok() && run.remark().is_none());
}

#[test]
fn failing_rows_are_told_and_the_others_run() {
    let gpu = Gpu::open().expect("the adapter opened before");
    let entries = vec![
        double("wrong", 2.5),
        double("no number", f64::NAN),
        Entry::new("panics", "while made", |_| panic!("no such row")),
        Entry::new("panics", "while run", |_| Ok(Row::new([8.0, 0.0], |_| panic!("in a call")))),
        Entry::new("refuses", "to be made", |_| Err(Error::config("not here"))),
        Entry::new("faults", "the device", |gpu| {
            let other = gpu.clone();
            Ok(Row::new([8.0, 0.0], move |_| {
                other.raise(Error::device("a fault of this row"));
                Tensor::ones(&other, [2]).affine(2.0, 0.0)
            }))
        }),
        Entry::new("exceeds", "a limit", |gpu| {
            let x = Tensor::ones(gpu, [1]);
            Ok(Row::new([8.0, 0.0], move |_| x.expand([1 << 20, 1 << 20]).contiguous()))
        }),
        double("right", 2.0),
    ];
    let (run, lines) = went(&gpu, entries, &settings(far()));
    assert_eq!(names(&run), ["double right"]);
    let words = [
        "element 7 is 2, want 2.5",
        "want NaN",
        "no such row",
        "in a call",
        "not here",
        "a fault of this row",
        "",
    ];
    assert_eq!(run.failed.len(), words.len(), "{:?}", run.failed);
    for (failed, word) in run.failed.iter().zip(words) {
        assert!(failed.error.contains(word), "{}: {}", failed.name(), failed.error);
        assert!(failed.line().contains("FAILED"), "{}", failed.line());
    }
    let verdict = run.verdict().expect_err("seven have no time").to_string();
    assert!(verdict.contains("7 of 8 rows failed") && verdict.contains("double wrong"), "{verdict}");
    let wrong =
        lines.iter().find(|line| line.contains("\"double\"") && line.contains("\"wrong\"")).expect("a line");
    assert!(wrong.contains("\"line\":\"failed\"") && !wrong.contains("median_ms"), "{wrong}");

    let folder = Folder::new("bench_failed");
    let read = again(&folder, &lines);
    assert_eq!(read[0].failed, run.failed);
    assert!(markdown(&read).contains("| double wrong | failed: "), "{}", markdown(&read));
    assert!(page(&read).expect("a page").contains("Failed: double wrong"), "the page tells it");
}

#[test]
fn a_device_that_is_lost_is_opened_again() {
    let lose = || {
        Entry::new("loses", "the device", |gpu| {
            let gpu = gpu.clone();
            Ok(Row::new([8.0, 0.0], move |_| {
                gpu.lose();
                Tensor::ones(&gpu, [2]).affine(2.0, 0.0)
            }))
        })
    };
    let entries = || vec![lose(), double("behind", 2.0), double("last", 2.0)];
    let gpu = || Gpu::open().expect("the adapter opened before");
    let reopening = Settings { reopen: Box::new(Gpu::open), ..settings(far()) };
    let mut lost = 0;
    let opened = run(gpu(), entries(), &reopening, &mut |event| {
        lost += matches!(event, Event::Lost(Ok(()))) as usize;
        Ok(())
    })
    .expect("the loop ends");
    assert_eq!((names(&opened).len(), lost), (2, 1), "{:?}", opened.failed);

    let mut lost = 0;
    let closed = run(gpu(), entries(), &settings(far()), &mut |event| {
        lost += matches!(event, Event::Lost(Err(_))) as usize;
        Ok(())
    })
    .expect("the loop ends");
    assert_eq!((names(&closed).len(), lost), (0, 1), "told once");
    assert!(closed.failed[1].error.contains("not run"), "{:?}", closed.failed);
}

#[test]
fn ceilings_that_cannot_be_measured_are_absent() {
    let gpu = Gpu::open().expect("the adapter opened before");
    gpu.lose();
    let settings = Settings { ceilings: None, reopen: Box::new(Gpu::open), ..settings(far()) };
    let mut told = Vec::new();
    let run = run(gpu, vec![double("a", 2.0), double("b", 2.0)], &settings, &mut |event| {
        if let Event::Measured(which, Some(_)) = event {
            told.push(which.name());
        }
        Ok(())
    })
    .expect("the loop ends");
    assert!(told.contains(&"copy") && told.contains(&"fma f32") && told.contains(&"readback"), "{told:?}");
    assert_eq!(run.ceilings, Ceilings::default());
    assert_eq!(names(&run), ["double b"], "the first finds the device lost");
    assert_eq!((run.records[0].fraction, run.records[0].ceiling.as_str()), (None, "none"));
    let page = page(std::slice::from_ref(&run)).expect("a page");
    assert!(page.contains("No row of this run counts operations"));
    assert!(markdown(&[run]).contains("copy - GB/s"));
}

#[test]
fn a_row_above_its_ceiling_has_it_measured_again() {
    let low = Ceilings { copy: Some(1.0), ..far() };
    let (run, lines) = went(gpu(), vec![double("a", 2.0), double("b", 2.0)], &settings(low));
    assert_eq!(names(&run), ["double a", "double b"]);
    assert!(run.ceilings.copy.is_some_and(|copy| copy > 1e6), "a byte a second was not kept");
    let ceilings = lines.iter().filter(|line| line.contains("\"line\":\"ceilings\"")).count();
    assert!(ceilings >= 2, "the new ones are a line");
    // Fractions are of the last ceilings in the file, whatever the lines of the rows say.
    let read = again(&Folder::new("bench_above"), &lines);
    for record in read[0].records.iter().chain(&run.records) {
        let want = 8.0 * 65536.0 / run.ceilings.copy.expect("measured") / (record.median_ms * 1e-3);
        assert!(record.fraction.is_some_and(|f| (f - want).abs() < 1e-9 * want), "{:?}", record.fraction);
    }
}

#[test]
fn a_row_that_stays_above_is_marked_everywhere() {
    // More bytes than any memory can move, so the row is above every measured ceiling.
    let entry = Entry::new("boasts", "of bytes", |gpu| {
        let x = Tensor::ones(gpu, [1 << 10]);
        Ok(Row::new([1e15, 0.0], move |_| x.affine(2.0, 0.0)))
    });
    let (run, lines) = went(gpu(), vec![entry], &settings(Ceilings { copy: Some(1.0), ..far() }));
    assert!(run.verdict().is_ok(), "above a ceiling is no failure");
    assert!(run.records[0].line().contains("copy (!)"), "{}", run.records[0].line());
    assert!(lines.iter().any(|line| line.contains("\"above\":true")), "{lines:?}");
    let remark = run.remark().expect("what the mark says");
    let runs = [run];
    assert!(markdown(&runs).contains("(!)") && markdown(&runs).contains(remark));
    let page = page(&runs).expect("a page");
    assert!(page.contains("copy (!)") && page.contains(remark));
}

fn results(name: &str) -> PathBuf {
    root().join("benches/results").join(name)
}

#[test]
fn files_of_earlier_versions_are_read() {
    // Another program wrote these, with sorted keys and a space after the colon.
    let h200 = read_runs(&results("h200-d082107.jsonl")).expect("a file that we show");
    assert_eq!((h200.len(), h200[0].records.len()), (1, 31));
    let record = |name: &str| h200[0].records.iter().find(|r| r.name() == name).expect("it is there");
    assert_eq!(record("matmul f16 4096x4096x4096").ceiling, "coop f16");
    let adamw = record("adamw 4194304").fraction.expect("held against copy");
    assert!((adamw - 0.8338799605193904).abs() < 1e-9, "{adamw}");
    let lavapipe = read_runs(&results("lavapipe-26.2.6-epyc-2-cores.jsonl")).expect("a file that we show");
    assert_eq!((lavapipe.len(), lavapipe[0].records.len()), (1, 37));
}

/// What is read is written as it was: no key of a committed line has another name or value today.
#[test]
fn committed_lines_are_read_and_written_alike() {
    let files = std::fs::read_dir(results("")).expect("results").map(|entry| entry.expect("a file").path());
    let (mut own, mut others) = (0, 0);
    for path in files.filter(|path| path.extension().is_some_and(|e| e == "jsonl")) {
        Baseline::read(&path).expect("times of somebody");
        let text = std::fs::read_to_string(&path).expect("a text");
        if !text.contains("\"line\"") {
            others += 1;
            continue;
        }
        own += 1;
        let mut lines = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).expect("JSON"));
        let mut holds = |written: Option<serde_json::Value>| {
            let (written, line) = (written.expect("a line"), lines.next().expect("as many"));
            for (key, value) in line.as_object().expect("an object") {
                // A row of a run in parts was held against the ceilings of its part: there is one where there was one.
                let held = key == "fraction" && value.is_null() == written[key].is_null();
                assert!(written[key] == *value || held, "{key}: {line} {written}");
            }
        };
        let run = &read_runs(&path).expect("our own lines")[0];
        holds(Event::Host(&run.host).to_json());
        holds(Event::Ceilings(&run.ceilings).to_json());
        run.records.iter().for_each(|record| holds(Event::Row(record).to_json()));
        assert!(run.failed.is_empty() && lines.next().is_none(), "{}", path.display());
    }
    assert!(own >= 3 && others >= 2, "{own} of ours, {others} of others");
}

#[test]
fn the_page_draws_every_row_that_counts_operations() {
    let files = ["h200-d082107.jsonl", "lavapipe-22.3.6-epyc-2-cores.jsonl"];
    let runs: Vec<Run> = files.iter().flat_map(|name| read_runs(&results(name)).expect("lines")).collect();
    let page = page(&runs).expect("a page");
    let counting = |run: &Run| run.records.iter().filter(|r| r.flops > 0.0 && r.bytes > 0.0).count();
    let points: usize = runs.iter().map(counting).sum();
    assert_eq!(page.matches("<circle ").count(), points);
    assert_eq!(page.matches("</title></circle>").count(), points, "each says which row it is");
    let named = |r: &tiebeam::bench::Record| format!("<title>{}: {}</title>", r.name(), r.rate());
    let matmul = runs[0].records.iter().find(|r| r.name() == "matmul 1024x1024x1024").expect("a row");
    assert!(page.contains(&named(matmul)), "{}", named(matmul));
    // A bar for each row of each run, as wide as its share.
    let rows: usize = runs.iter().map(|run| run.records.len()).sum();
    assert_eq!(page.matches("<b style=\"width:").count(), rows);
    assert!(page.contains("<b style=\"width:83.4%;background:#0072b2\"></b>"), "adamw");
}

#[test]
fn a_file_of_several_runs_is_split_at_its_hosts() -> Result<()> {
    let folder = Folder::new("bench_runs");
    let (_, lines) = went(gpu(), vec![double("a", 2.0)], &settings(far()));
    let read = again(&folder, &[lines.clone(), lines.clone()].concat());
    assert_eq!(read.iter().map(|run| run.records.len()).collect::<Vec<_>>(), [1, 1]);
    // A run that was killed while it measured ceilings.
    assert_eq!(again(&folder, &lines[..1])[0].ceilings, Ceilings::default());

    let path = folder.join("broken.jsonl");
    let behind = |line: &str| format!("{}\n{line}", lines[0]);
    for (text, what) in [
        ("{\"line\":\"row\"}".into(), ":1: no host"),
        ("{\"line\":\"host\"}".into(), ":1: missing field `adapter`"),
        ("\n{".into(), ":2: not JSON"),
        (String::new(), "no run"),
        (behind("{}"), ":2: missing field `line`"),
        (behind("{\"line\":\"dance\"}"), ":2: unknown variant `dance`, expected one of `ceilings`, `row`"),
        (behind("{\"line\":\"failed\",\"shape\":\"x\"}"), ":2: missing field `family`"),
        (behind("{\"line\":\"ceilings\",\"copy_bytes_s\":\"much\"}"), ":2: invalid type: string \"much\""),
    ] {
        std::fs::write(&path, &text).expect("a file");
        let error = read_runs(&path).expect_err(&text).to_string();
        assert!(error.contains(what) && error.contains("broken.jsonl"), "{error}");
    }
    Ok(())
}

#[test]
fn a_killed_run_leaves_whole_lines_and_the_earlier_file() -> Result<()> {
    let folder = Folder::new("bench_part");
    let path = folder.join("mine.jsonl");
    std::fs::write(&path, "earlier").expect("a file");
    let mut part = Part::create(&path)?;
    let mut rows = 0;
    let stopped =
        run(gpu().clone(), vec![double("a", 2.0), double("b", 2.0)], &settings(far()), &mut |event| {
            if let Some(line) = event.to_json() {
                part.line(&line.to_string())?;
            }
            rows += matches!(event, Event::Turn(_)) as usize;
            if rows < 2 { Ok(()) } else { Err(Error::config("killed")) }
        });
    assert!(stopped.is_err(), "what the listener returns ends the loop");
    drop(part);
    assert_eq!(std::fs::read_to_string(&path).expect("it stays"), "earlier");
    let left = read_runs(&Part::beside(&path))?;
    assert_eq!(names(&left[0]), ["double a"]);

    let mut whole = Part::create(&path)?;
    whole.line("{}")?;
    whole.finish()?;
    assert_eq!(std::fs::read_to_string(&path).expect("it was replaced"), "{}\n");
    assert!(!Part::beside(&path).exists());
    Ok(())
}

#[test]
fn a_baseline_stands_beside_the_rows_of_its_names() -> Result<()> {
    let run = &read_runs(&results("h200-d082107.jsonl"))?[0];
    let torch = Baseline::read(&results("h200-d082107-torch.jsonl"))?.matches(run);
    let row = |name: &str| torch.rows.iter().find(|row| row.name == name).expect("both have it");
    let product = row("matmul 1024x1024x1024");
    assert_eq!((product.theirs_ms, product.lines), (0.06187, 1));
    assert!(product.who.contains("torch") && product.who.contains("NVIDIA H200"), "{}", product.who);
    let table = torch.table();
    let line = table.lines().find(|line| line.starts_with("matmul 1024x1024x1024")).expect("a line");
    assert!(line.contains("0.132     0.0619         2.14  torch"), "{line}");
    assert!(torch.ours.contains(&"adds in a chain 1000 of 1024".into()), "{:?}", torch.ours);
    assert!(torch.theirs.contains(&"copy 1 GiB".into()), "{:?}", torch.theirs);
    assert!(table.contains("only from us: ") && table.contains("only from them: "), "{table}");
    // This file has 'op' instead of 'family', and another word for layer_norm.
    let burn = Baseline::read(&results("h200-d082107-burn.jsonl"))?.matches(run);
    assert!(burn.rows.iter().any(|row| row.name == "layer_norm 4096x768"), "{:?}", burn.rows);
    // Our own file compared with itself.
    let own = Baseline::read(&results("h200-d082107.jsonl"))?.matches(run);
    assert!(own.ours.is_empty() && own.theirs.is_empty() && own.rows.len() == 31);
    Ok(())
}

#[test]
fn rows_have_names_of_their_own_which_other_engines_use() -> Result<()> {
    for cpu in [true, false] {
        let names: Vec<String> = entries(cpu, Suite::Full).iter().map(Entry::name).collect();
        let distinct: BTreeSet<&String> = names.iter().collect();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
        let real = |entry: &Entry| entry.name() == "train_step d768 T1024 B8 tied x12";
        let asked = entries(cpu, Suite::Quick).into_iter().find(real).map(|entry| entry.asked);
        assert_eq!(asked, Some(cpu), "minutes on a CPU driver");
        // Every row that was ever measured can be measured again under its name.
        let old = if cpu { "lavapipe-22.3.6-epyc-2-cores.jsonl" } else { "h200-d082107.jsonl" };
        for run in read_runs(&results(old))? {
            let gone: Vec<String> =
                run.records.iter().map(tiebeam::bench::Record::name).filter(|n| !names.contains(n)).collect();
            assert!(gone.is_empty(), "{old}: {gone:?}");
        }
        if cpu {
            continue;
        }
        let run = Run { records: Vec::new(), ..read_runs(&results("h200-d082107.jsonl"))?.remove(0) };
        let torch = Baseline::read(&results("h200-d082107-torch.jsonl"))?.matches(&run).theirs;
        let only: Vec<&String> = torch.iter().filter(|name| !names.contains(name)).collect();
        assert_eq!(only, ["copy 1 GiB", "gelu(x*y+z) compiled 4096x1024", "matmul tf32 4096"]);
    }
    Ok(())
}

/// With checks, a row is compared at more elements, and again after it was timed.
#[test]
fn checks_look_at_more_and_look_again() -> Result<()> {
    let softmax = || {
        let mut all = entries(gpu().adapter().is_software(), Suite::Quick).into_iter();
        all.find(|entry| entry.name() == "softmax 4096x1024").expect("a row of the quick suite")
    };
    let [few, many] = [false, true].map(|check| (softmax().make)(gpu(), check));
    let (few, many) = (few?, many?);
    assert!(few.checks.len() >= 3 && many.checks.len() >= few.checks.len() + 64);
    many.check(gpu())?;
    let rows: BTreeSet<usize> = many.checks.iter().map(|check| check.at / 1024).collect();
    let columns: BTreeSet<usize> = many.checks.iter().map(|check| check.at % 1024).collect();
    assert!(rows.len() > 50 && columns.len() > 50, "{rows:?} {columns:?}");

    // A result that is right until it is timed.
    let spoilt = || {
        Entry::new("spoilt", "later", |gpu| {
            let x = Tensor::ones(gpu, [1 << 10]);
            let calls = Cell::new(0);
            let run = move |_| {
                calls.set(calls.get() + 1);
                x.affine(if calls.get() > 1 { 3.0 } else { 2.0 }, 0.0)
            };
            let checks = vec![Check { at: 5, want: 2.0, bound: 0.0 }];
            Ok(Row { checks, repeats: true, ..Row::new([8192.0, 0.0], run) })
        })
    };
    let (run, _) = went(gpu(), vec![spoilt()], &settings(far()));
    assert_eq!(names(&run), ["spoilt later"]);
    let (run, _) = went(gpu(), vec![spoilt()], &Settings { check: true, ..settings(far()) });
    assert!(run.failed[0].error.contains("element 5 is 3, want 2"), "{:?}", run.failed);
    Ok(())
}

#[test]
fn words_select_rows() {
    let entry = double("a", 2.0);
    let words = |words: &[&str]| words.iter().map(|s| s.to_string()).collect::<Vec<_>>();
    assert!(
        entry.is_wanted(&[]) && entry.is_wanted(&words(&["x", "ble a"])) && !entry.is_wanted(&words(&["x"]))
    );
    let long = Entry { asked: true, ..entry };
    assert!(!long.is_wanted(&[]) && long.is_wanted(&words(&["double"])));
}

#[test]
fn of_lines_of_one_name_the_fastest_counts() -> Result<()> {
    let folder = Folder::new("bench_baseline");
    let path = folder.join("theirs.jsonl");
    let line = |ms: f64| {
        format!(
            "{{\"op\":\"double\",\"shape\":\"a\",\"median_ms\":{ms},\"peer\":\"p\",\"precision\":\"{ms} bits\"}}\n"
        )
    };
    std::fs::write(&path, [line(3.0), line(2.0), line(4.0)].concat()).expect("a file");
    let (run, _) = went(gpu(), vec![double("a", 2.0)], &settings(far()));
    let found = Baseline::read(&path)?.matches(&run);
    assert_eq!((found.rows[0].theirs_ms, found.rows[0].lines), (2.0, 3));
    assert!(found.table().contains("p, 2 bits, the fastest of 3 lines"), "{}", found.table());

    for (text, what) in [
        (line(1.0) + "{\"op\":\"x\"}\n", ":2: missing field `shape`"),
        ("{\"shape\":\"x\",\"median_ms\":1}".into(), ":1: no text 'family' or 'op'"),
        ("{\"op\":\"x\",\"shape\":\"y\"}".into(), ":1: missing field `median_ms`"),
        (line(1.0).replace("1,", "\"1\","), ":1: invalid type: string \"1\", expected f64"),
        (line(0.0), ":1: 'median_ms' is not above 0"),
        ("[]".into(), ":1: no JSON object"),
        (String::new(), "no line with a time"),
    ] {
        std::fs::write(&path, &text).expect("a file");
        let error = Baseline::read(&path).expect_err(&text).to_string();
        assert!(error.contains(what) && error.contains("theirs.jsonl"), "{error}");
    }
    Ok(())
}

#[test]
fn a_row_can_be_planned_and_taken_apart() -> Result<()> {
    // What other tests dispatch on the device meanwhile would be part of the shares.
    let gpu = &Gpu::open()?;
    // A plan runs nothing, so a row with a wrong expected value can be planned too.
    assert_eq!(plan(gpu, double("a", 3.0))?.len(), 1);
    assert!(kernels(gpu, double("a", 3.0)).is_err(), "a wrong value");
    let table = kernels(gpu, double("a", 2.0))?.table();
    assert!(table.contains("100.0%") && table.contains("elementwise main"), "{table}");
    // A training step, whose optimizer changes parameters in place.
    let step = |entry: &Entry| entry.name() == "train_step d256 T128 B2 tied x4";
    let step = entries(false, Suite::Full).into_iter().find(step).expect("a row");
    let planned = plan(gpu, step)?;
    assert!(planned.iter().any(|(line, _)| line.starts_with("adamw: ")), "{planned:?}");
    // Work after planning runs as usual.
    let (run, _) = went(gpu, vec![double("a", 2.0)], &settings(far()));
    run.verdict()
}
