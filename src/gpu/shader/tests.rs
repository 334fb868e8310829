use super::*;
use naga::valid::Capabilities;

/// A small `shaders/` that exists in memory only.
fn files(name: &str) -> Result<Loaded, String> {
    let text = match name {
        "kernel" => {
            "#import lhs = plain // the left operand\n#import scale\nconst ROWS: u32 = 8u;\n\
             fn f() -> f32 { return lhs() * scale(); }\n"
        }
        "lib/plain" => "fn lhs() -> f32 { return 1.0; }\n",
        "lib/gathered" => "const STEP: i32 = 1i;\nfn lhs() -> f32 { return f32(STEP); }\n",
        "lib/scale" => "fn scale() -> f32 { return 2.0; }\n",
        "lib/nested" => "\n#import plain\n",
        "lib/broken" => "\nfn scale() -> f32 {\n    return 1u;\n}\n",
        _ => return Err("no such file in shaders/".into()),
    };
    Ok((format!("shaders/{name}.wgsl").into(), text.into()))
}

fn assemble(source: Source) -> Assembled {
    let assembled = source.assemble_with(&files).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(assembled.text.lines().count(), assembled.lines.len(), "one place a line");
    assembled
}

fn text(text: &str) -> String {
    assemble(Source::text("t", text)).text
}

/// The file, line and message of the error that a source must give.
fn refuse(source: Source) -> (String, u32, String) {
    match source.assemble_with(&files) {
        Err(Error::Shader { file, line, message, .. }) => (file, line, message),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refuse_text(text: &str, line: u32, words: &str) {
    let (file, at, message) = refuse(Source::text("t", text));
    assert!(file == "t" && at == line && message.contains(words), "{file}:{at}: {message}");
}

#[test]
fn constants_of_every_kind_are_replaced_in_place() {
    let source = Source::text(
        "t",
        "const A: u32 = 1u; // rows = 1;\nconst B: i32 = 1;\nconst C : f32=0.5;\nconst D: bool = true;\n\
         alias Elem = f32;\nconst E: i32 = 2i;\nfn f() {\n    const A: u32 = 9u;\n}\n",
    );
    let source = source.u32("A", 64).i32("B", -3).f32("C", 1e-30).bool("D", false).alias("Elem", "vec4<f32>");
    let assembled = assemble(source.i32("E", i32::MIN));
    assert_eq!(
        assembled.text(),
        "const A: u32 = 64u; // rows = 1;\nconst B: i32 = -3i;\nconst C : f32=1e-30f;\nconst D: bool = false;\n\
         alias Elem = vec4<f32>;\nconst E: i32 = i32(-2147483648);\nfn f() {\n    const A: u32 = 9u;\n}\n"
    );
    assembled.check(Capabilities::empty()).expect("naga reads every literal");
}

#[test]
fn the_last_choice_holds_and_defaults_stay() {
    let source = Source::text("t", "const A: u32 = 1u;\nconst B: u32 = 2u;").u32("A", 5).u32("A", 6);
    assert_eq!(assemble(source).text(), "const A: u32 = 6u;\nconst B: u32 = 2u;\n");
}

#[test]
fn wrong_constants_are_refused() {
    let source =
        Source::text("t", "const A: u32 = 1u;\n    const B: u32 = 1u;\nconst C = 1u;\nconst F: f32 = 1;");
    let (file, line, message) = refuse(source.clone().f32("A", 1.0));
    assert_eq!((file.as_str(), line, message.as_str()), ("t", 1, "A is u32, the host gives f32"));
    for name in ["B", "C", "a"] {
        let (_, line, message) = refuse(source.clone().u32(name, 1));
        assert_eq!(line, 0);
        assert_eq!(message, format!("no typed constant or alias {name} in column 0; there are: A, F"));
    }
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let (_, line, message) = refuse(source.clone().f32("F", value));
        assert!(line == 4 && message.contains("F: WGSL has no constant"), "{message}");
    }
    assert!(refuse(Source::text("t", "").u32("A", 1)).2.ends_with("there are: none"));
}

#[test]
fn imports_are_appended_once_and_lines_stay_true() {
    let assembled = assemble(Source::file("kernel"));
    let lines: Vec<_> = assembled.text().lines().collect();
    assert_eq!(&lines[..3], ["", "", "const ROWS: u32 = 8u;"]);
    assert_eq!(&lines[4..], ["fn lhs() -> f32 { return 1.0; }", "fn scale() -> f32 { return 2.0; }"]);
    assert_eq!(
        assembled.files(),
        ["shaders/kernel.wgsl", "shaders/lib/plain.wgsl", "shaders/lib/scale.wgsl"]
    );
    assert_eq!(assembled.locate(4), ("shaders/kernel.wgsl", 4));
    assert_eq!(assembled.locate(6), ("shaders/lib/scale.wgsl", 1));
    assert_eq!(assembled.locate(0), ("shaders/kernel.wgsl", 0));
    assert_eq!(assembled.locate(7), ("shaders/kernel.wgsl", 0));
    let twice = text("#import plain\n#import a = plain\n#import b = plain\nfn f() {}");
    assert_eq!(twice, "\n\n\nfn f() {}\nfn lhs() -> f32 { return 1.0; }\n");
}

#[test]
fn slots_are_exchanged_and_their_constants_replaced() {
    let assembled = assemble(Source::file("kernel").slot("lhs", "gathered").i32("STEP", 3));
    assert!(assembled.text().contains("const STEP: i32 = 3i;") && !assembled.text().contains("1.0"));
    let code = "#import plain\nfn scaled() -> f32 { return lhs(); }\nconst STEP: i32 = 1i;";
    let source = Source::text("t", "#import epilogue = scale\nfn f() { _ = scaled(); }");
    let assembled = assemble(source.slot_text("epilogue", "chain", code).i32("STEP", 4));
    assert_eq!(assembled.files(), ["t", "chain", "shaders/lib/plain.wgsl"]);
    assert_eq!(assembled.locate(4), ("chain", 2));
    assert!(assembled.text().contains("const STEP: i32 = 4i;"));
    assembled.check(Capabilities::empty()).expect("valid");
}

#[test]
fn wrong_imports_are_refused() {
    assert_eq!(refuse(Source::file("missing")).0, "missing.wgsl");
    refuse_text("\n#import missing", 2, "missing.wgsl: no such file");
    refuse_text("#import", 1, "write '#import name' or '#import slot = name'");
    refuse_text("#import a b", 1, "cannot read '#import a b'");
    refuse_text("#import a = ", 1, "cannot read");
    refuse_text("#import a = plain\n#import a = scale", 2, "slot a is declared twice");
    refuse_text("#include plain", 1, "there is no #include");
    let (file, line, message) = refuse(Source::text("t", "#import nested"));
    assert_eq!((file.as_str(), line), ("shaders/lib/nested.wgsl", 2));
    assert!(message.contains("one level"), "{message}");
    let (file, line, message) = refuse(Source::file("kernel").slot("rhs", "plain"));
    assert_eq!((file.as_str(), line), ("shaders/kernel.wgsl", 0));
    assert_eq!(message, "no slot rhs; there are: lhs");
    let (file, line, _) = refuse(Source::file("kernel").slot("lhs", "missing"));
    assert_eq!((file.as_str(), line), ("shaders/kernel.wgsl", 1));
}

#[test]
fn unrolling_repeats_nests_and_computes() {
    let source = "const N: u32 = 2u;\n  #unroll i N // rows\na$i = ${i}u; // $i stays\n#unroll j N*4 / 4\n\
                  b${i}_${j} = c[${(i+1)*N-j%2}u].$xyzw{i*2+j};\n#end\n  #end\nend";
    let expected = "const N: u32 = 2u;\na0 = 0u; // $i stays\nb0_0 = c[2u].x;\nb0_1 = c[1u].y;\n\
                    a1 = 1u; // $i stays\nb1_0 = c[4u].z;\nb1_1 = c[3u].w;\nend\n";
    let assembled = assemble(Source::text("t", source));
    assert_eq!(assembled.text(), expected);
    let places: Vec<u32> = (1..9).map(|line| assembled.locate(line).1).collect();
    assert_eq!(places, [1, 3, 5, 5, 3, 5, 5, 8]);
    let fewer = assemble(Source::text("t", source).u32("N", 1));
    assert_eq!(fewer.text(), "const N: u32 = 1u;\na0 = 0u; // $i stays\nb0_0 = c[1u].x;\nend\n");
    assert_eq!(text("#unroll i 0\nx\n#end\ny"), "y\n");
    assert_eq!(text("#unroll i 6\n#unroll j i/4\n$i\n#end\n#end\n"), "4\n5\n");
}

#[test]
fn counts_follow_constants_made_of_constants() {
    let source =
        "const TILE: u32 = ROWS * 2u;\n#unroll i TILE/COLS\n$i\n#end\n#import rows = none\nx[${TILE}]";
    let rows = "const ROWS: u32 = 4u;\nconst COLS: i32 = 4i;";
    let assembled = assemble(Source::text("t", source).slot_text("rows", "rows", rows).u32("ROWS", 6));
    assert_eq!(&assembled.text()[29..45], "0\n1\n2\n\nx[12]\ncon");
}

#[test]
fn wrong_unrolls_are_refused() {
    refuse_text("x\n#unroll i 2\nx", 2, "#unroll without #end");
    refuse_text("#unroll i 2\n#end\n#end", 3, "#end without #unroll");
    refuse_text("#unroll 2\n#end", 1, "write '#unroll i COUNT'");
    refuse_text("#unroll i\n#end", 1, "write '#unroll i COUNT'");
    refuse_text("#unroll i N\n#end", 1, "no integer constant is called 'N'");
    refuse_text("const N: f32 = 1;\n#unroll i N\n#end", 2, "no integer constant is called 'N'");
    refuse_text("#unroll i 2\n#unroll i 2\n#end\n#end", 2, "the name is taken");
    refuse_text("const i: u32 = 2u;\n#unroll i 2\n#end", 2, "the name is taken");
    refuse_text("#unroll i 2\n#import plain\n#end", 2, "#import inside #unroll");
    refuse_text("#unroll i 100\n#unroll j 10000\nx\n#end\n#end", 3, "more than 100000 lines");
    refuse_text("const N: u32 = N*2;\n#unroll i N\n#end", 2, "too deeply");
}

#[test]
fn wrong_expressions_are_refused() {
    for (code, words) in [
        ("$j", "no unroll variable"),
        ("${i", "'${' without '}'"),
        ("$iu", "write ${..}"),
        ("$", "a number or a name is missing"),
        ("${}", "a number or a name is missing"),
        ("${i+}", "a number or a name is missing"),
        ("${(i}", "a parenthesis stays open"),
        ("${i i}", "cannot read 'i'"),
        ("${i<<1}", "cannot read '<<1'"),
        ("${i-1}", "0 - 1 is no u32"),
        ("${1/i}", "1 / 0 is no u32"),
        ("${1%i}", "1 % 0 is no u32"),
        ("${4294967295+1}", "is no u32"),
        ("${65536*65536}", "is no u32"),
        ("${99999999999}", "a number or a name is missing at '99999999999'"),
        ("$xyzw{j}", "no unroll variable"),
    ] {
        refuse_text(&format!("#unroll i 1\n{code}\n#end"), 2, words);
    }
}

#[test]
fn enables_stand_on_line_one() {
    let source = Source::text("t", "// kernel\nfn f() -> f16 { return 1h; }\n").enable("f16");
    let assembled = assemble(source.clone());
    assert_eq!(assembled.text().lines().next(), Some("enable f16; // kernel"));
    assembled.check(Capabilities::SHADER_FLOAT16).expect("valid");
    assert!(assembled.check(Capabilities::empty()).is_err());
    assert!(refuse(source.enable("f16; x")).2.contains("no extension"));
}

fn check(source: Source) -> (String, u32, String) {
    match assemble(source).check(Capabilities::all()) {
        Err(Error::Shader { file, line, message, .. }) => (file, line, message),
        other => panic!("{other:?}"),
    }
}

#[test]
fn errors_of_naga_carry_the_line_of_the_file() {
    // An error in parsing, after an unroll.
    let (file, line, message) =
        check(Source::text("t", "fn f() {\n#unroll i 5\n_ = $i;\n#end\n_ = missing;\n}"));
    assert_eq!((file.as_str(), line), ("t", 5));
    assert!(message.contains("missing") && message.contains("t:5"), "{message}");
    // An error in validation, inside a fragment.
    let (file, line, message) = check(Source::text("t", "#import broken\n").enable("f16"));
    assert_eq!((file.as_str(), line), ("shaders/lib/broken.wgsl", 3));
    assert!(message.contains("return 1u;"), "{message}");
    // The end of the text has no line.
    let (file, _, _) = check(Source::text("t", "fn f() {"));
    assert_eq!(file, "t");
}

#[test]
fn keys_tell_sources_apart_and_forget_the_order() {
    let base = || Source::file("kernel");
    assert_eq!(base().u32("A", 1).u32("B", 2).key(), base().u32("B", 2).u32("A", 1).key());
    let keys = [
        base(),
        Source::file("other"),
        Source::text("kernel", ""),
        Source::text("kernel", "x"),
        base().u32("A", 1),
        base().i32("A", 1),
        base().u32("A", 2),
        base().slot("s", "a"),
        base().slot_text("s", "n", "a"),
        base().slot_text("s", "n", "b"),
        base().enable("f16"),
        Source::text("kernel", "x\nc A 2 1u"),
    ]
    .map(|source| source.key());
    for (i, a) in keys.iter().enumerate() {
        assert!(keys[i + 1..].iter().all(|b| a != b), "{a}");
    }
}

#[test]
fn the_dump_is_what_the_device_gets() {
    let own = crate::files::scratch::Folder::new("dump");
    let folder = own.join("made");
    let source = Source::text("a kernel", "#unroll i 2\n// $i\nx$i\n#end\n");
    let assembled = assemble(source.clone());
    let path = source.dump(&assembled, &folder).expect("written");
    assert_eq!(std::fs::read_to_string(&path).expect("readable"), assembled.text());
    assert!(path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("a_kernel-")));
    assert!(source.dump(&assembled, &path).is_err(), "a file is no folder");
}

#[test]
fn every_embedded_file_is_loaded_by_name() {
    for name in names().into_iter().map(String::from).chain(fragments().iter().map(|f| format!("lib/{f}"))) {
        assert!(!load(&name).expect("loads").1.is_empty(), "{name} is empty");
    }
    assert!(fragments().contains(&"elementwise"));
    assert!(load("no_such_kernel").is_err());
}
