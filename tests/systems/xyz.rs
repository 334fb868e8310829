//! Extended XYZ as programs write it: what is read, under which names, what is refused and where, and what reads back.

use crate::support::folder::Folder;
use crate::support::potentials::frame;
use std::io::{BufReader, Read};
use tiebeam::geometry::Cell;
use tiebeam::geometry::xyz::{self, Column, Frame, Keys, Kind, Labels, Quantity, Reader, Writer};

#[test]
fn frames_read_back_as_the_same_bits() {
    let mut periodic = frame(4, 2, 1.0 / 3.0);
    periodic.cell = Some(Cell {
        vectors: [[5.1, 0.0, 0.0], [1e-17, 6.2, 0.0], [0.1, -0.3, 1e9 / 7.0]],
        periodic: [true, true, false],
    });
    periodic.stress = Some([[0.1, -0.2, 0.3], [-0.2, 1.0 / 3.0, 0.5], [0.3, 0.5, -1e-300]]);
    let values = [
        ("config_type", "bulk"),
        ("note", r#"two words, "quoted" and {braces} \ 'and' [more]"#),
        ("empty", ""),
        ("two words", "é"),
        ("matrix", "[[1, 2], [3, 4]]"),
    ];
    periodic.other = values.map(|(k, v)| (k.to_string(), v.to_string())).into();
    let column = |name: &str, kind, width, row: &str| Column {
        name: name.into(),
        kind,
        width,
        rows: vec![row.to_string(); periodic.len()],
    };
    periodic.columns = vec![
        column("tags", Kind::Integer, 1, "007"),
        column("momenta", Kind::Real, 3, "1.50 2e0 nan"),
        column("fixed", Kind::Logical, 2, "T F"),
        column("name", Kind::Text, 1, "a\"b=c"),
    ];
    let frames = [periodic, frame(5, 1, 1.0), Frame { forces: None, ..frame(6, 2, 1e-9) }, Frame::default()];
    let folder = Folder::new("round");
    let path = folder.join("round.xyz");
    xyz::write(&path, &frames).expect("written");
    assert_eq!(xyz::read(&path).expect("read"), frames);
}

#[test]
fn other_programs_frames_are_read() {
    let text = "2\nLattice=\"4 0 0 0 5 0 0 0 6\" Properties=id:I:1:species:S:1:tags:R:2:pos:R:3:force:R:3:fixed:L:1 energy=-1.5D+1 \
                pbc=\"T F T\" virial={1 2 3} tensor=[[1, 2], [3, 4]] converged\n\
                1 Cu 0.5 1 0.0 0.5 1.0 1 2 3 T\n2 8 0 0 1e-1 1 2 -1 -2 -3 F\n";
    let frames = xyz::parse(text).expect("a frame");
    let [frame] = &frames[..] else { panic!("{} frames", frames.len()) };
    assert_eq!(frame.species, [29, 8]);
    assert_eq!(frame.positions, [[0.0, 0.5, 1.0], [0.1, 1.0, 2.0]]);
    assert_eq!(frame.forces.as_deref(), Some(&[[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]][..]));
    let vectors = [[4.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 6.0]];
    assert_eq!(frame.cell, Some(Cell { vectors, periodic: [true, false, true] }));
    assert_eq!(frame.energy, Some(-15.0));
    assert_eq!(
        (frame.other["converged"].as_str(), frame.other["tensor"].as_str()),
        ("T", "[[1, 2], [3, 4]]")
    );
    let columns: Vec<_> =
        frame.columns.iter().map(|c| (c.name.as_str(), c.kind, c.width, c.rows[0].as_str())).collect();
    let [id, tags, fixed] =
        [("id", Kind::Integer, 1, "1"), ("tags", Kind::Real, 2, "0.5 1"), ("fixed", Kind::Logical, 1, "T")];
    assert_eq!(columns, [id, tags, fixed]);
    // Plain XYZ has a free comment and no Properties.
    let plain = xyz::parse("1\nmade by hand, E = -3.1 eV; it's the the one\nH 0 0 0\n\n").expect("plain");
    assert_eq!((&plain[0].species[..], plain[0].energy), (&[1][..], None));
    assert_eq!(plain[0].other["comment"], "made by hand, E = -3.1 eV; it's the the one");
    assert_eq!(xyz::parse("").expect("no frame"), []);
}

#[test]
fn malformed_frames_are_refused_by_line() {
    let good = "1\nProperties=species:S:1:pos:R:3\nH 0 0 0\n";
    let cases = [
        ("x\n\n", 1, "no number of atoms"),
        ("-1\n\n", 1, "no number of atoms"),
        ("1\n", 2, "ends before the line of keys"),
        ("2\n\nH 0 0 0\n", 4, "ends after 1 of 2 atoms"),
        ("99999999999999\n\nH 0 0 0\n", 4, "ends after 1 of"),
        ("1\n\nH 0 0\n", 3, "3 columns, `Properties` names 4"),
        (
            "1\nProperties=species:S:1:pos:R:3:Z:I:1\nCu 0 0 0 1\n",
            3,
            "atom 0 is Cu by `species` and number 1 (H) by `Z`",
        ),
        ("1\nProperties=species:S:1:pos:R:3:Z:I:1\nCu 0 0 0 129\n", 3, "`Z` is `129`"),
        ("1\nProperties=Z:S:1:pos:R:3\nCu 0 0 0\n", 2, "must be 1 of I"),
        ("1\nLatice=\"8 0 0 0 8 0 0 0 8\"\nH 0 0 0\n", 2, "`Latice` is nearly `Lattice`"),
        ("1\nPropetries=species:S:1:pos:R:3\nH 0 0 0\n", 2, "nearly `Properties`"),
        ("1\nlattice=5 Lattice=\"8 0 0 0 8 0 0 0 8\"\nH 0 0 0\n", 2, "both `Lattice` and `lattice`"),
        ("1\nLattice energy=1\nH 0 0 0\n", 2, "`Lattice` has no value"),
        ("1\nstress=\"1 2 3\" energy=1\nH 0 0 0\n", 2, "3 numbers; it needs 9, or 6"),
        ("1\nProperties=species:S:1:pos:R:3:a:I:1:a:I:1\nH 0 0 0 1 1\n", 2, "comes twice"),
        ("1\nLattice=\"8 0 0 0 8 0 0 0 8\" pcb=\"T T F\"\nH 0 0 0\n", 2, "`pcb` is nearly `pbc`"),
        ("1\nLattice=\"8 0 0 0 8 0 0 0 8\" periodic=\"T T F\"\nH 0 0 0\n", 2, "`periodic` is nearly `pbc`"),
        ("1\nLattice: \"8 0 0 0 8 0 0 0 8\" energy=1\nH 0 0 0\n", 2, "`Lattice:` has no value"),
        ("1\nLattice: 8 0 0 0 8 0 0 0 8\nH 0 0 0\n", 2, "`Lattice:` has no value"),
        ("1\nLat=\"8 0 0 0 8 0 0 0 8\" energy=1\nH 0 0 0\n", 2, "`Lat` is nearly `Lattice`"),
        ("1\nProperties=\"species:S:1:pos:R:3:my col:R:1\"\nH 0 0 0 1\n", 2, "without blanks"),
        ("1\nenergy=1 note=\"a\rb\"\nH 0 0 0\n", 2, "carriage return"),
        ("1\nenergy=1 \"\"=5\nH 0 0 0\n", 2, "without a key"),
        ("VEC1 5 0 0\n", 1, "give the cell as `Lattice`"),
        ("1\n\nQq 0 0 0\n", 3, "`Qq` is no element"),
        ("1\n\n119 0 0 0\n", 3, "`119` is no element"),
        ("1\n\nH 0 nan 0\n", 3, "no finite number"),
        ("1\n\nH 0 1e999 0\n", 3, "no finite number"),
        ("1\n\nH 0 abc 0\n", 3, "`abc`"),
        ("1\nLattice=\"1 0 0 0 1 0 0 0\"\nH 0 0 0\n", 2, "8 numbers; it needs 9"),
        ("1\nLattice=\"1 0 0 0 1 0 0 0 x\"\nH 0 0 0\n", 2, "`x`"),
        ("1\nLattice=\"1 0 0\nH 0 0 0\n", 2, "no closing"),
        ("1\npbc=\"T T T\"\nH 0 0 0\n", 2, "without `Lattice`"),
        ("1\nLattice=\"1 0 0 0 1 0 0 0 1\" pbc=\"T T\"\nH 0 0 0\n", 2, "three of T and F"),
        ("1\nenergy=low\nH 0 0 0\n", 2, "`energy` is `low`"),
        ("1\nenergy=1 energy=2\nH 0 0 0\n", 2, "comes twice"),
        ("1\nProperties=species:S:1\nH\n", 2, "no `pos`"),
        ("1\nProperties=pos:R:3\n0 0 0\n", 2, "no `species`"),
        ("1\nProperties=species:S:1:pos:R\nH 0 0 0\n", 2, "name:kind:width"),
        ("1\nProperties=species:S:1:pos:R:2\nH 0 0\n", 2, "must be 3 of R"),
        ("1\nProperties=species:S:1:pos:R:3:x:R:0\nH 0 0 0\n", 2, "1 to 1024"),
        ("1\nProperties=species:S:1:pos:R:3:x:R:99999999999999999999\nH 0 0 0\n", 2, "1 to 1024"),
        ("1\nProperties=species:S:1:pos:R:3:pos:R:3\nH 0 0 0 0 0 0\n", 2, "comes twice"),
    ];
    for (text, line, reason) in cases {
        for (before, lines) in [("", 0), (good, 3)] {
            let (at, message) = xyz::parse(&format!("{before}{text}")).expect_err(text);
            assert_eq!(at, line + lines, "{text:?}: {message}");
            assert!(message.contains(reason), "{text:?}: {message}");
        }
    }
    let folder = Folder::new("bad");
    let path = folder.join("bad.xyz");
    std::fs::write(&path, "1\n\nH 0 0\n").expect("written");
    let message = xyz::read(&path).expect_err("a short line").to_string();
    assert!(message.contains("bad.xyz: line 3: "), "{message}");
    let frame = Frame { species: vec![1], ..Frame::default() };
    let message = xyz::write(&path, &[frame]).expect_err("lists that differ").to_string();
    assert!(message.contains("1 species, 0 positions"), "{message}");
    assert_eq!(std::fs::read_to_string(&path).expect("as it was"), "1\n\nH 0 0\n");
}

fn read(text: &str, keys: Keys) -> (Vec<Frame>, Labels) {
    let mut reader = Reader::new(text.as_bytes()).keys(keys);
    let frames = reader.by_ref().collect::<tiebeam::Result<_>>().expect(text);
    (frames, reader.labels().clone())
}

/// Each of these files stands for a report about some program.
#[test]
fn what_others_write_is_read_as_ase_reads_it() {
    let cube = Cell { vectors: [[8.0, 0.0, 0.0], [0.0, 8.0, 0.0], [0.0, 0.0, 8.0]], periodic: [true; 3] };
    let atoms = "Cu 0 0 0\nCu 0 0 2.5\n";
    // The line of keys, the energy and whether there is the cell, and a word of the remark if there is one.
    for (keys, energy, periodic, remark) in [
        ("Properties=species:S:1:pos:R:3 Energy=-1", Some(-1.0), false, None),
        ("Properties=species:S:1:pos:R:3 energy=\"_JSON 1.5\"", Some(1.5), false, None),
        ("energy = -3.1", Some(-3.1), false, None),
        ("E = -3.1 eV", None, false, None),
        ("Lattice='8 0 0 0 8 0 0 0 8' Properties=species:S:1:pos:R:3", None, true, None),
        ("Lattice=[[8,0,0],[0,8,0],[0,0,8]] Properties=species:S:1:pos:R:3", None, true, None),
        ("Lattice=\"_JSON [[8,0,0],[0,8,0],[0,0,8]]\" pbc=T", None, true, None),
        ("Lattice={8 0 0 0 8 0 0 0 8} pbc=\"_JSON [true, true, true]\"", None, true, None),
        (
            "properties=species:S:1:pos:R:3 Lattice=\"8 0 0 0 8 0 0 0 8\"",
            None,
            true,
            Some("`properties` was read as"),
        ),
        ("lattice=\"8 0 0 0 8 0 0 0 8\" PBC=\"1 1 1\"", None, true, Some("`lattice` was read as `Lattice`")),
        ("cell=\"8 8 8\" energy=1", Some(1.0), false, Some("`cell` was not read")),
        ("energy_unit=eV compute_forces=T energy=2", Some(2.0), false, None),
        ("Energy=low energy_dft=3", None, false, Some("`Energy` is `low`")),
    ] {
        let (frames, labels) = read(&format!("2\n{keys}\n{atoms}"), Keys::default());
        let [frame] = &frames[..] else { panic!("{keys}: {} frames", frames.len()) };
        assert_eq!((&frame.species[..], frame.positions[1]), (&[29, 29][..], [0.0, 0.0, 2.5]), "{keys}");
        assert_eq!((frame.energy, frame.cell), (energy, periodic.then_some(cube)), "{keys}");
        let remarks: Vec<String> = labels.remarks().collect();
        let fits = remark.map_or(remarks.is_empty(), |words| remarks.iter().any(|r| r.contains(words)));
        assert!(fits, "{keys}: {remarks:?}");
    }
    // Symbols in small and capital letters, the mark of Windows' editors, its line ends, and words beyond the columns.
    let (frames, labels) = read("\u{feff}2\r\n\r\ncu 0 0 0 1 2\r\nCU 0 0 2.5 3 4\r\n", Keys::default());
    assert_eq!((frames[0].species.as_slice(), frames[0].positions[1]), (&[29, 29][..], [0.0, 0.0, 2.5]));
    let remarks: Vec<String> = labels.remarks().collect();
    assert!(remarks.len() == 1 && remarks[0].contains("2 words after the 4"), "{remarks:?}");
    // Numbers without symbols, and both.
    for columns in ["Z:I:1:pos:R:3", "Z:I:1:pos:R:3:species:S:1"] {
        let row = if columns.contains("species") { "29 0 0 0 Cu" } else { "29 0 0 0" };
        let (frames, _) = read(&format!("1\nProperties={columns}\n{row}\n"), Keys::default());
        assert_eq!((frames[0].species.as_slice(), frames[0].columns.len()), (&[29][..], 0), "{columns}");
    }
    // Blank lines before, between and after frames.
    let (frames, labels) = read("\n1\n\nH 0 0 0\n\n \n1\n\nO 0 0 0\n\n\n", Keys::default());
    assert_eq!(frames.iter().map(|f| f.species[0]).collect::<Vec<_>>(), [1, 8]);
    let remarks: Vec<String> = labels.remarks().collect();
    assert!(remarks[0].contains("line 1 is blank") && remarks[0].contains("2 times"), "{remarks:?}");
}

#[test]
fn labels_have_many_names() {
    let text = |keys: &str, columns: &str, row: &str| {
        format!(
            "1\nLattice=\"2 0 0 0 2 0 0 0 2\" Properties=species:S:1:pos:R:3{columns} {keys}\nCu 0 0 0 {row}\n"
        )
    };
    // The names of ASE, MACE, GAP and QUIP, alone and together: the first of the list is used.
    for (keys, energy) in [
        ("energy=1 free_energy=2 REF_energy=3", 1.0),
        ("free_energy=2 REF_energy=3", 3.0),
        ("dft_energy=4 free_energy=2", 4.0),
        ("DFT_Energy=4", 4.0),
        ("Energy=6 energy=5", 5.0),
    ] {
        assert_eq!(read(&text(keys, "", ""), Keys::default()).0[0].energy, Some(energy), "{keys}");
    }
    for (columns, forces) in [
        (":forces:R:3:REF_forces:R:3", [1.0, 2.0, 3.0]),
        (":gap_forces:R:3:REF_forces:R:3", [4.0, 5.0, 6.0]),
        (":tags:R:3:force:R:3", [4.0, 5.0, 6.0]),
        (":dft_force:R:3:x:R:3", [1.0, 2.0, 3.0]),
    ] {
        let frame = &read(&text("", columns, "1 2 3 4 5 6"), Keys::default()).0[0];
        assert_eq!(frame.forces.as_deref(), Some(&[forces][..]), "{columns}");
    }
    let full = [[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]];
    for (keys, sign) in [
        ("stress=\"1 6 5 6 2 4 5 4 3\" virial=\"9 9 9 9 9 9 9 9 9\"", 1.0),
        ("stress=\"1 2 3 4 5 6\"", 1.0),
        ("REF_stress=\"_JSON [[1, 6, 5], [6, 2, 4], [5, 4, 3]]\"", 1.0),
        // The volume is 8.
        ("virial=\"1 6 5 6 2 4 5 4 3\"", -0.125),
        ("dft_virials=[[1, 6, 5], [6, 2, 4], [5, 4, 3]]", -0.125),
    ] {
        let stress = read(&text(keys, "", ""), Keys::default()).0[0].stress;
        assert_eq!(stress, Some(full.map(|row| row.map(|x| sign * x))), "{keys}");
    }
    // What was asked is used, or nothing.
    let given = text(
        "energy=1 mine=2 my_virial=\"1 6 5 6 2 4 5 4 3\" stress=\"1 2 3 4 5 6\"",
        ":forces:R:3:gap_forces:R:3",
        "1 2 3 4 5 6",
    );
    let (frames, labels) = read(&format!("{given}{}", text("energy=1", "", "")), asked());
    assert_eq!((frames[0].energy, frames[1].energy), (Some(2.0), None));
    assert_eq!(frames[0].forces.as_deref(), Some(&[[4.0, 5.0, 6.0]][..]));
    assert_eq!(frames[0].stress.map(|s| s[0]), Some([-0.125, -0.75, -0.625]));
    let table = labels.to_string();
    for line in [
        "energy   `energy` found in 2 and not used; `mine` used in 1 of 2",
        "forces   `forces` found in 1 and not used; `gap_forces` used in 1 of 2",
        "stress   `stress` found in 1 and not used",
        "virial   `my_virial` used in 1 of 2",
    ] {
        assert!(table.lines().any(|l| l.starts_with(line)), "{table}");
    }
    assert_eq!((labels.used(Quantity::Energy), labels.used(Quantity::Stress)), (1, 0));
    assert!(read(&text("", "", ""), Keys::default()).1.to_string().contains("energy   absent"));
    // A value that was asked for must be one.
    for (keys, columns, reason) in [("mine=low", "", "`mine` is `low`"), ("my_virial=1", "", "1 numbers")] {
        let text = text(keys, columns, "1");
        let message = Reader::new(text.as_bytes()).keys(asked()).next().expect("a frame").expect_err(keys);
        assert!(message.to_string().contains(reason), "{message}");
    }
    // A virial without a cell is no stress.
    let (frames, labels) =
        read("1\nProperties=species:S:1:pos:R:3 virial=\"1 6 5 6 2 4 5 4 3\"\nCu 0 0 0\n", Keys::default());
    assert_eq!(frames[0].stress, None);
    assert!(labels.remarks().any(|r| r.contains("needs the volume")), "{labels}");
    // Names of references are kept beside the fields, and the format's own are the fields if they are used.
    let frame =
        &read(&text("energy=1 REF_energy=2", ":forces:R:3:REF_forces:R:3", "1 2 3 4 5 6"), Keys::default()).0
            [0];
    assert_eq!(
        (frame.other.keys().map(String::as_str).collect::<Vec<_>>(), frame.columns[0].rows[0].as_str()),
        (vec!["REF_energy"], "4 5 6")
    );
    let kept = frame.without_results();
    assert_eq!(
        (kept.energy, kept.forces.is_none(), kept.other == frame.other, kept.columns == frame.columns),
        (None, true, true, true)
    );
}

/// Energy, forces and stress of a frame belong to one computation, where the file allows it, and else this is said.
#[test]
fn labels_are_of_one_family() {
    let text = |keys: &str, columns: &str| {
        format!(
            "1\nLattice=\"2 0 0 0 2 0 0 0 2\" Properties=species:S:1:pos:R:3{columns} {keys}\nCu 0 0 0 1 2 3 4 5 6\n"
        )
    };
    let both = ":forces:R:3:REF_forces:R:3";
    let by = |keys: Keys, energy: &str, columns: &str| {
        let (frames, labels) = read(&text(energy, columns), keys);
        let frame = &frames[0];
        let said = labels.remarks().any(|r| r.contains("different computations"));
        (frame.energy, frame.forces.as_ref().map(|f| f[0][0]), frame.stress.map(|s| s[0][0]), said)
    };
    let plain = || Keys::default();
    let stress = "stress=\"1 1 1 0 0 0\" REF_stress=\"2 2 2 0 0 0\"";
    for (keys, energy, columns, want) in [
        (plain(), "energy=1 REF_energy=2", both, (Some(1.0), Some(1.0), None, false)),
        (plain(), "energy=1 REF_energy=2", ":REF_forces:R:3:x:R:3", (Some(2.0), Some(1.0), None, false)),
        (plain(), "REF_energy=2 dft_energy=3", ":dft_forces:R:3:x:R:3", (Some(3.0), Some(1.0), None, false)),
        (plain(), "REF_energy=2", both, (Some(2.0), Some(4.0), None, false)),
        (plain(), "energy=1", ":REF_forces:R:3:x:R:3", (Some(1.0), Some(1.0), None, true)),
        (plain(), &format!("REF_energy=2 {stress}"), both, (Some(2.0), Some(4.0), Some(2.0), false)),
        (plain(), "energy=1 REF_stress=\"2 2 2 0 0 0\"", both, (Some(1.0), Some(1.0), Some(2.0), true)),
        (
            Keys::default().energy(Some("energy".into())),
            "energy=1 REF_energy=2",
            ":REF_forces:R:3:x:R:3",
            (Some(1.0), Some(1.0), None, true),
        ),
        (
            Keys::default().energy(Some("REF_energy".into())),
            "energy=1 REF_energy=2",
            both,
            (Some(2.0), Some(4.0), None, false),
        ),
    ] {
        assert_eq!(by(keys, energy, columns), want, "{energy} {columns}");
    }
    // Of a simulation, the potential energy has the forces.
    let (frames, labels) =
        read(&text("potential_energy=-100 kinetic_energy=5 total_energy=-95", both), plain());
    assert_eq!(frames[0].energy, Some(-100.0));
    assert!(!labels.to_string().contains("kinetic"), "{labels}");
    let (frames, labels) = read(&text("total_energy=-95", both), plain());
    assert_eq!(frames[0].energy, Some(-95.0));
    assert!(labels.remarks().any(|r| r.contains("may hold kinetic energy")), "{labels}");
    // Frames whose energies have several names are one set only with a word.
    let all = text("energy=1", both) + &text("total_energy=1", both) + &text("energy=3", both);
    let (_, labels) = read(&all, plain());
    assert!(
        labels
            .remarks()
            .any(|r| r.contains("energies are from several names") && r.contains("`energy` in 2")),
        "{:?}",
        labels.remarks().collect::<Vec<_>>()
    );
    let keys = plain().energy(Some("energy".into())).stress(Some("nothere".into()));
    let labels = read(&text("energy=1", both), keys.clone()).1;
    assert_eq!(labels.missing(&keys).collect::<Vec<_>>(), [(Quantity::Stress, "nothere")]);
    let (_, labels) = read(&text("stress=\"1 9 0 0 1 0 0 0 1\"", both), plain());
    assert!(labels.remarks().any(|r| r.contains("not symmetric")), "{labels}");
}

/// A label that is no number, or has another type, is left out with a word, and the frame is read.
#[test]
fn bad_labels_are_left_out() {
    let row = "1 2 3";
    for (keys, columns, row, asked, remark) in [
        ("energy=nan", ":x:R:3", row, Keys::default(), "`energy` is `nan`, no finite number"),
        ("REF_energy=nan", ":x:R:3", row, Keys::default(), "`REF_energy` is `nan`"),
        ("energy=********", ":x:R:3", row, Keys::default(), "`energy` is `********`"),
        ("stress=\"1 2 3 nan 5 6\"", ":x:R:3", row, Keys::default(), "no finite number"),
        ("", ":forces:R:3", "1 nan 3", Keys::default(), "line 3: `forces` is not finite here"),
        ("", ":REF_forces:R:3", "1 inf 3", Keys::default(), "line 3: `REF_forces` is not finite"),
        ("", ":REF_forces:I:3", row, Keys::default(), "`REF_forces:I:3` was not used as forces"),
        ("", ":dft_forces:S:3", row, Keys::default(), "`dft_forces:S:3` was not used as forces"),
        ("", ":forces:R:1:x:R:2", row, Keys::default(), "`forces:R:1` was not used as forces"),
        ("", ":gap_forces:R:1:x:R:2", row, asked(), "`gap_forces:R:1` was not used as forces"),
        ("my_virial=\"1 2 3 4 5 6\"", ":x:R:3", row, asked(), "needs the volume"),
    ] {
        let text = format!("1\nProperties=species:S:1:pos:R:3{columns} {keys}\nCu 0 0 0 {row}\n");
        let (frames, labels) = read(&text, asked);
        let frame = &frames[0];
        assert_eq!((frame.energy, &frame.forces, frame.stress), (None, &None, None), "{text}");
        let all: Vec<String> = labels.remarks().collect();
        assert!(all.iter().any(|r| r.contains(remark)), "{text}: {all:?}");
        assert!(labels.found.iter().any(|l| l.unfit == 1 && l.used == 0), "{text}: {labels}");
        // What was not used is written as it was, if it has no field.
        let again = xyz::text("again.xyz", &frames).expect("it can be written");
        if !row.contains(['n', 'f']) {
            assert_eq!(xyz::parse(&again).expect("it reads back"), frames, "{again}");
        }
    }
}

/// Results under plain names would stand beside numbers that are not theirs. What only looks alike stays.
#[test]
fn results_leave_and_other_values_stay() {
    let text = "2\nProperties=species:S:1:pos:R:3:Forces:R:3:energy:R:1:stress:R:6:local_energy:R:1:energies:R:1:virial:R:9:force:R:1:\
                dft_forces:R:3 Energy=-1 Free_Energy=3 potential_energy=-2 Virial=\"1 2 3 4 5 6\" stresses=\"1 2\" force=0.5 \
                virials=abc my_energy=1 REF_energy=4 total_energy=none energies=\"1 2\"\n";
    let row = |s: &str| format!("{s} 0 0 0 1 2 3 1 1 2 3 4 5 6 1 1 1 2 3 4 5 6 7 8 9 0.5 4 5 6\n");
    let frame = &read(&(text.to_string() + &row("Cu") + &row("O")), Keys::default()).0[0];
    let kept = frame.without_results();
    let keys: Vec<&str> = kept.other.keys().map(String::as_str).collect();
    assert_eq!(keys, ["REF_energy", "force", "my_energy", "stresses", "total_energy", "virials"]);
    let columns: Vec<&str> = kept.columns.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(columns, ["force", "dft_forces"]);
    assert!(!frame.loses_stress(), "`virials` stays");
    // Labels that were asked for do not take the place of the file's own.
    let text = "1\nProperties=species:S:1:pos:R:3:forces:R:3:REF_forces:R:3 energy=-1 REF_energy=-2\nCu 0 0 0 1 2 3 4 5 6\n";
    let (mut frames, _) = read(text, Keys::default().energy(Some("REF_energy".into())));
    assert_eq!((frames[0].energy, frames[0].other["energy"].as_str()), (Some(-2.0), "-1"));
    let message = xyz::text("out.xyz", &frames).expect_err("two energies").to_string();
    assert!(message.contains("`forces` cannot be another column, as the frame has a field"), "{message}");
    frames[0].forces = None;
    let message = xyz::text("out.xyz", &frames).expect_err("two energies").to_string();
    assert!(message.contains("`energy` is among the other keys"), "{message}");
    frames[0].energy = None;
    let again = xyz::parse(&xyz::text("out.xyz", &frames).expect("one energy")).expect("it reads back");
    assert_eq!(again[0].other["REF_energy"], "-2");
}

/// Keys and values come out as they went in, a comment that is nothing but keys too.
#[test]
fn values_are_written_as_they_were() {
    let p = "Properties=species:S:1:pos:R:3";
    for (keys, want) in [
        ("l=[1,2] m=[a,b] f=[T,F] n=5 q=\"5\" flag=T s='two words' d=x\"1 2\" e=1e-3", None),
        ("j=\"_JSON [1, 2]\" k={1 2} m=[[1,2],[3,4]]", None),
        ("config_type=bulk weight=2", None),
        ("done config_type=bulk energy=1", Some("config_type=bulk done=T")),
        ("a=\\", Some("a=\"\"")),
    ] {
        let text = format!("1\n{p} {keys}\nH 0 0 0\n");
        let (frames, _) = read(&text, Keys::default());
        let written = xyz::text("out.xyz", &frames).expect("written");
        let line = written.lines().nth(1).expect("a line of keys");
        let mut words: Vec<&str> = line.split(&p).nth(1).expect("keys").trim().split(' ').collect();
        let mut given: Vec<&str> = want.unwrap_or(keys).split(' ').collect();
        words.retain(|word| !word.starts_with("energy="));
        words.sort();
        given.sort();
        assert_eq!(words, given, "{line}");
        assert_eq!(xyz::parse(&written).expect("it reads back"), frames, "{written}");
    }
    // A changed value has another spelling.
    let mut frame = read(&format!("1\n{p} l=[1,2]\nH 0 0 0\n"), Keys::default()).0.remove(0);
    frame.other.insert("l".into(), "3 4".into());
    assert!(xyz::text("out.xyz", &[frame]).expect("written").contains("l=\"3 4\""));
    for (comment, other) in [
        ("config_type=bulk weight=2", &[("config_type", "bulk"), ("weight", "2")][..]),
        ("=== step 1 ===", &[("comment", "=== step 1 ===")]),
        ("d=1.5\" by hand", &[("comment", "d=1.5\" by hand")]),
        ("E = -3.1 eV", &[("comment", "E = -3.1 eV")]),
        ("a=1 a=2", &[("comment", "a=1 a=2")]),
        ("Lattice constant 3.6", &[("comment", "Lattice constant 3.6")]),
    ] {
        let (frames, _) = read(&format!("1\n{comment}\nH 0 0 0\n"), Keys::default());
        let found: Vec<(&str, &str)> =
            frames[0].other.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(found, other, "{comment}");
    }
    let small = Frame {
        positions: vec![[1e-300, -2.5e-20, 1e300]],
        ..Frame { species: vec![1], ..Frame::default() }
    };
    let written = xyz::text("out.xyz", std::slice::from_ref(&small)).expect("written");
    assert!(written.contains("H 1e-300 -2.5e-20 1e300"), "{written}");
    assert_eq!(xyz::parse(&written).expect("it reads back"), [small]);
}

fn asked() -> Keys {
    Keys::default()
        .energy(Some("mine".into()))
        .forces(Some("gap_forces".into()))
        .stress(Some("my_virial".into()))
}

/// Frames come before the rest of the input is read, and a claimed number of atoms takes no memory.
#[test]
fn a_reader_takes_one_frame_at_a_time() {
    /// Text without end.
    struct Endless(usize);
    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let text = b"1\nnote=x\nH 0 0 0\n";
            for place in buffer.iter_mut() {
                *place = text[self.0 % text.len()];
                self.0 += 1;
            }
            Ok(buffer.len())
        }
    }
    let mut reader = Reader::new(BufReader::with_capacity(64, Endless(0)));
    let mut text = Vec::new();
    let mut writer = Writer::new(&mut text, "out.xyz");
    for frame in reader.by_ref().take(1000) {
        writer.write(&frame.expect("a frame")).expect("written");
    }
    assert_eq!((writer.frames(), reader.labels().frames, reader.bytes()), (1000, 1000, 17_000));
    let again = xyz::parse(std::str::from_utf8(&text).expect("text")).expect("frames");
    assert_eq!(again.len(), 1000);
    // Names without end, and lines that make a reader of bad design take the square of their length.
    let names: String = (0..2000).map(|i| format!("1\nenergy_{i}=1 energy=2\nH 0 0 0\n")).collect();
    let (frames, labels) = read(&names, Keys::default());
    assert_eq!((frames.len(), labels.used(Quantity::Energy)), (2000, 2000));
    assert!(labels.found.len() <= 256, "{} names", labels.found.len());
    assert!(labels.remarks().any(|r| r.contains("beyond the first 256")), "{labels}");
    for line in ["a ".to_string() + &"= b ".repeat(200_000), "'a \"b ".repeat(200_000)] {
        read(&format!("1\n{line}\nH 0 0 0\n"), Keys::default());
    }
    // Many columns take no more than their share of the time, and too many are refused.
    let columns = |n: usize| {
        let names: String = (0..n).map(|i| format!(":a{i}:I:1")).collect();
        format!("1\nProperties=species:S:1:pos:R:3{names}\nH 0 0 0{}\n", " 1".repeat(n))
    };
    assert_eq!(read(&columns(4094), Keys::default()).0[0].columns.len(), 4094);
    let (line, message) = xyz::parse(&columns(100_000)).expect_err("too many columns");
    assert!(line == 2 && message.contains("the most are 4096"), "{message}");
    let words = "energy=1 ".to_string() + &"ab ".repeat(100_000);
    let (line, message) = xyz::parse(&format!("1\n{words}\nH 0 0 0\n")).expect_err("too many words");
    assert!(line == 2 && message.contains("more than 65536"), "{message}");
    // What comes after an error is not read.
    let mut reader = Reader::new(&b"1\n\nH 0 0 0\nx\n1\n\nH 0 0 0\n"[..]).named("my.xyz");
    assert!(reader.next().expect("a frame").is_ok());
    let message = reader.next().expect("an error").expect_err("no number").to_string();
    assert!(message.contains("my.xyz: line 4: `x` is no number of atoms"), "{message}");
    assert!(reader.next().is_none());
    for (text, reason) in
        [(&b"1\n\xc5\nH 0 0 0\n"[..], "line 2: byte 0 of the line is not UTF-8"), (b"1\n\nH 0", "line 3")]
    {
        let message = Reader::new(text).next().expect("an error").expect_err(reason).to_string();
        assert!(message.contains(reason), "{message}");
    }
}
