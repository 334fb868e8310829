//! Translates every kernel in every variant for Vulkan, Metal and DX12. Needs no GPU.

mod dump;
mod lint;

use naga::back::{hlsl, msl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo};
use naga::{AddressSpace, Module, ShaderStage};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tiebeam::gpu::shader::{Assembled, Source, file, fragments, names};
use tiebeam::gpu::variant;

/// The translation of one entry point, and the entry point's name in it.
struct Written {
    bytes: Vec<u8>,
    entry: String,
}

/// A writer of one entry point. `checked` adds the checks that debug builds have.
type Write = fn(&Module, &ModuleInfo, entry: &str, checked: bool) -> Result<Written, String>;

/// Each target with its capabilities. Validation against all capabilities would accept code that naga then silently translates
/// wrongly: `atomicAdd` of floats becomes one of integers in HLSL.
fn targets() -> [(&'static str, Capabilities, Write); 3] {
    [
        // SPIR-V 1.3 is what wgpu writes for Vulkan 1.1, the oldest version with subgroups.
        ("SPIR-V", spv::supported_capabilities(), |m, i, entry, checked| {
            write_spirv((1, 3), m, i, entry, checked)
        }),
        ("MSL", msl::supported_capabilities(), write_msl),
        ("HLSL", hlsl::supported_capabilities(), write_hlsl),
    ]
}

fn policies(checked: bool) -> BoundsCheckPolicies {
    let policy = if checked { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked };
    BoundsCheckPolicies { index: policy, buffer: policy, ..BoundsCheckPolicies::default() }
}

fn write_spirv(
    lang_version: (u8, u8),
    module: &Module,
    info: &ModuleInfo,
    entry: &str,
    checked: bool,
) -> Result<Written, String> {
    let zeroed = match checked {
        true => spv::ZeroInitializeWorkgroupMemoryMode::Polyfill,
        false => spv::ZeroInitializeWorkgroupMemoryMode::None,
    };
    let options = spv::Options {
        lang_version,
        bounds_check_policies: policies(checked),
        zero_initialize_workgroup_memory: zeroed,
        force_loop_bounding: checked,
        emit_int_div_checks: checked,
        ..spv::Options::default()
    };
    let pipeline = spv::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: entry.into() };
    let words = spv::write_vec(module, info, &options, Some(&pipeline)).map_err(|e| e.to_string())?;
    if words.len() <= 5 {
        return Err("nothing but a header came out".into());
    }
    Ok(Written { bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect(), entry: entry.into() })
}

fn write_msl(module: &Module, info: &ModuleInfo, entry: &str, checked: bool) -> Result<Written, String> {
    let options = msl::Options {
        // 2.3 is the oldest version with SIMD-group matrices, and 2.1 is the oldest with SIMD groups.
        lang_version: (2, 3),
        // wgpu chooses the slots when it creates the pipeline.
        fake_missing_bindings: true,
        bounds_check_policies: policies(checked),
        zero_initialize_workgroup_memory: checked,
        force_loop_bounding: checked,
        ..msl::Options::default()
    };
    let pipeline = msl::PipelineOptions {
        entry_point: Some((ShaderStage::Compute, entry.into())),
        ..msl::PipelineOptions::default()
    };
    let (text, made) = msl::write_string(module, info, &options, &pipeline).map_err(|e| e.to_string())?;
    one_entry(text, made.entry_point_names)
}

fn write_hlsl(module: &Module, info: &ModuleInfo, entry: &str, checked: bool) -> Result<Written, String> {
    let register = |register| Some(hlsl::BindTarget { register, ..hlsl::BindTarget::default() });
    let options = hlsl::Options {
        // The oldest version with 16-bit floats.
        shader_model: hlsl::ShaderModel::V6_2,
        fake_missing_bindings: true,
        immediates_target: register(90),
        special_constants_binding: register(91),
        zero_initialize_workgroup_memory: checked,
        restrict_indexing: checked,
        force_loop_bounding: checked,
        ..hlsl::Options::default()
    };
    let pipeline = hlsl::PipelineOptions { entry_point: Some((ShaderStage::Compute, entry.into())) };
    let mut text = String::new();
    let made = hlsl::Writer::new(&mut text, &options, &pipeline).write(module, info, None);
    let names = made.map_err(|e| e.to_string())?.entry_point_names;
    one_entry(text, names)
}

/// Checks the result of a writer, because a writer may report success although an entry point failed.
fn one_entry<E: ToString>(text: String, made: Vec<Result<String, E>>) -> Result<Written, String> {
    let [made] = <[_; 1]>::try_from(made).map_err(|m| format!("{} entry points, not one", m.len()))?;
    let entry = made.map_err(|e| e.to_string())?;
    if !text.contains(&entry) {
        return Err(format!("{entry} is not in the text"));
    }
    Ok(Written { bytes: text.into_bytes(), entry })
}

/// The number of storage buffers per kernel that every adapter supports.
const MOST_BUFFERS: usize = 8;

/// Returns the entry points that use more storage buffers than every adapter supports. Generated elementwise kernels are not
/// among the variants, since they use as many as the adapter allows.
fn too_many_buffers(module: &Module, info: &ModuleInfo) -> Vec<String> {
    let used = |entry: usize| {
        let info = info.get_entry_point(entry);
        let storage = |space| matches!(space, AddressSpace::Storage { .. });
        module.global_variables.iter().filter(|(at, v)| storage(v.space) && !info[*at].is_empty()).count()
    };
    let points = module.entry_points.iter().enumerate().map(|(i, point)| (&point.name, used(i)));
    let over = points.filter(|&(_, count)| count > MOST_BUFFERS);
    over.map(|(name, count)| format!("{name}: {count} storage buffers; {MOST_BUFFERS} are sure")).collect()
}

/// Finds local variables of a type with a layout. naga decorates structs and arrays, which SPIR-V 1.4 and later forbid in the
/// storage class `Function` (VUID-StandaloneSpirv-None-10684). Values of such types in a `let` are fine.
fn laid_out_locals(module: &Module) -> Vec<String> {
    let functions = module.functions.iter().map(|(_, function)| function);
    let functions = functions.chain(module.entry_points.iter().map(|point| &point.function));
    let locals = functions.flat_map(|function| function.local_variables.iter().map(|(_, local)| local));
    let has_layout = |local: &&naga::LocalVariable| {
        matches!(module.types[local.ty].inner, naga::TypeInner::Struct { .. } | naga::TypeInner::Array { .. })
    };
    let name = |local: &naga::LocalVariable| local.name.clone().unwrap_or_default();
    locals.filter(has_layout).map(|local| format!("SPIR-V: `var {}` has a layout", name(local))).collect()
}

/// Translates one variant for each of its targets. Returns the problems and the number of entry points.
fn translate(assembled: &Assembled) -> (Vec<String>, usize) {
    let (mut problems, mut entries) = (Vec::new(), 0);
    for (target, capabilities, write) in targets() {
        // naga has no cooperative matrices in HLSL, and panics instead of returning an error.
        if target == "HLSL" && assembled.text().contains("enable wgpu_cooperative_matrix;") {
            continue;
        }
        let (module, info) = match assembled.check(capabilities) {
            Ok(checked) => checked,
            Err(error) => {
                problems.push(format!("{target}: {error}"));
                continue;
            }
        };
        entries = module.entry_points.len();
        if entries == 0 {
            problems.push(format!("{target}: no entry point"));
        }
        if target == "SPIR-V" {
            problems.extend(too_many_buffers(&module, &info));
            problems.extend(laid_out_locals(&module));
        }
        for point in &module.entry_points {
            if point.stage != ShaderStage::Compute {
                problems.push(format!("{target}: {} is no compute shader", point.name));
                continue;
            }
            for checked in [false, true] {
                let written = catch_unwind(AssertUnwindSafe(|| write(&module, &info, &point.name, checked)));
                let problem = match written {
                    Ok(Ok(_)) => continue,
                    Ok(Err(words)) => words,
                    Err(_) => "naga panicked, see above".into(),
                };
                let checks = if checked { "with checks" } else { "without checks" };
                problems.push(format!("{target} {checks}: {}: {problem}", point.name));
            }
        }
    }
    (problems, entries)
}

/// Translates all variants. Returns every problem with its variant's key, the files used, and the number of entry points.
fn translate_all(variants: &[Source]) -> (Vec<String>, BTreeSet<String>, usize) {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let chunks = variants.chunks(variants.len().div_ceil(threads).max(1));
    let (mut problems, mut files, mut entries) = (Vec::new(), BTreeSet::new(), 0);
    std::thread::scope(|scope| {
        let all: Vec<_> = chunks.map(|chunk| scope.spawn(move || translate_each(chunk))).collect();
        for (own, used, count) in
            all.into_iter().map(|thread| thread.join().expect("panics are caught inside"))
        {
            problems.extend(own);
            files.extend(used);
            entries += count;
        }
    });
    (problems, files, entries)
}

fn translate_each(variants: &[Source]) -> (Vec<String>, BTreeSet<String>, usize) {
    let (mut problems, mut files, mut entries) = (Vec::new(), BTreeSet::new(), 0);
    for source in variants {
        let variant = source.key().replace('\n', ", ");
        let variant: String = variant.chars().take(300).collect();
        match source.assemble() {
            Ok(assembled) => {
                files.extend(assembled.files().iter().cloned());
                let (mut found, count) = translate(&assembled);
                found.extend(lint::problems(assembled.text()));
                entries += count;
                problems.extend(found.into_iter().map(|problem| format!("{variant}\n  {problem}")));
            }
            Err(error) => problems.push(format!("{variant}\n  {error}")),
        }
    }
    (problems, files, entries)
}

/// Reads the list of the variants that test suite and benchmark compile, one per line.
fn variants() -> Vec<Source> {
    let path = crate::support::folder::root().join("shaders/variants.txt");
    let list = std::fs::read_to_string(&path)
        .unwrap_or_else(|e| panic!("{}: {e}; run `make variants`", path.display()));
    let source = |line: &str| variant(line).unwrap_or_else(|| panic!("no kernel has the line: {line}"));
    list.lines().map(source).collect()
}

#[test]
fn every_variant_translates_to_every_target() {
    let variants = variants();
    let (mut problems, files, entries) = translate_all(&variants);
    let kernels = names().into_iter().filter_map(file);
    let parts = fragments().into_iter().filter_map(|name| file(&format!("lib/{name}")));
    let unused = kernels.chain(parts).filter(|file| !files.contains(*file));
    problems.extend(unused.map(|file| format!("{file}\n  no variant in shaders/variants.txt uses it")));
    println!("{} variants, {entries} entry points, {} files", variants.len(), files.len());
    assert!(!variants.is_empty() && entries > 0, "the list of variants is empty");
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
    if let Some(folder) = std::env::var_os("TIEBEAM_DUMP_SHADERS") {
        dump::all(&variants, folder.as_ref());
    }
}

/// A variant that is written as a line of the list is read back unchanged.
#[test]
fn lines_are_read_back() {
    let source = Source::from_line("softmax")
        .expect("a name")
        .u32("LANES", 8)
        .bool("LOG", true)
        .f32("SCALE", -1.5)
        .i32("SHIFT", i32::MIN);
    let source = source.alias("Elem", "vec4<f32>").slot("piece", "piece_4").enable("f16");
    let lines = source.lines();
    assert_eq!(lines.len(), 1);
    assert_eq!(Source::from_line(&lines[0]).expect("a kernel").key(), source.key());
    for source in variants() {
        for line in source.lines() {
            assert!(variant(&line).is_some_and(|again| again.lines().contains(&line)), "{line}");
        }
    }
}

/// Returns the problems of a text, one per line.
fn problems_of(text: &str) -> String {
    translate_all(&[Source::text("sample", text)]).0.join("\n")
}

const HEAD: &str = "struct P { n: u32, a: f32 }\nvar<immediate> p: P;\n\
    @group(0) @binding(0) var<storage, read> x: array<f32>;\n\
    @group(0) @binding(1) var<storage, read_write> y: array<f32>;\n\
    var<workgroup> tile: array<f32, 64>;\n@compute @workgroup_size(64)\n\
    fn forward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) all: vec3<u32>) {\n";

#[test]
fn a_sound_kernel_has_no_problem() {
    let body = "tile[id.x % 64u] = x[id.x] / f32(all.x);\nworkgroupBarrier();\n\
        for (var i = id.x; i < p.n; i += 64u) { y[i] = p.a * tile[i % 64u] + subgroupAdd(x[i]); }\n}\n";
    assert_eq!(problems_of(&format!("{HEAD}{body}")), "");
    assert_eq!(problems_of(&format!("{HEAD}}}\n@compute @workgroup_size(1) fn backward() {{}}")), "");
}

#[test]
fn what_one_target_cannot_do_is_a_problem_of_that_target() {
    let total = "@group(0) @binding(2) var<storage, read_write> total: atomic<f32>;";
    let float_atomics = problems_of(&format!("{HEAD}atomicAdd(&total, 1.5);\n}}\n{total}"));
    assert!(float_atomics.contains("HLSL") && !float_atomics.contains("SPIR-V"), "{float_atomics}");
    let barrier = problems_of(&format!("{HEAD}subgroupBarrier();\n}}"));
    assert!(barrier.contains("HLSL") && !barrier.contains("MSL"), "{barrier}");
}

#[test]
fn a_ninth_storage_buffer_is_a_problem() {
    let buffers = |count: usize| {
        let declared: String = (2..count)
            .map(|i| format!("\n@group(0) @binding({i}) var<storage, read> x{i}: array<f32>;"))
            .collect();
        let sum: String = (2..count).map(|i| format!(" + x{i}[0]")).collect();
        problems_of(&format!("{HEAD}y[0] = x[0]{sum};\n}}{declared}"))
    };
    assert_eq!(buffers(8), "");
    let ninth = buffers(9);
    assert!(ninth.contains("forward: 9 storage buffers"), "{ninth}");
}

#[test]
fn a_local_variable_with_a_layout_is_a_problem() {
    let of = |body: &str| problems_of(&format!("{HEAD}{body}\n}}\nstruct Pair {{ a: f32, b: f32 }}"));
    assert_eq!(of("let pair = Pair(x[0], p.a);\ny[0] = pair.a + pair.b;"), "");
    assert!(of("var pair = Pair(x[0], p.a);\ny[0] = pair.a;").contains("`var pair` has a layout"));
    assert!(of("var two = array<f32, 2>();\ny[0] = two[p.n];").contains("`var two` has a layout"));
}

#[test]
fn wrong_code_is_a_problem_with_its_line() {
    let unknown = problems_of(&format!("{HEAD}y[0] = missing;\n}}"));
    assert!(unknown.contains("shader sample:8: ") && unknown.contains("missing"), "{unknown}");
    assert!(problems_of("fn f() {}").contains("no entry point"));
    assert!(problems_of("@fragment fn f() {}").contains("no compute shader"));
    assert!(problems_of("#import missing").contains("sample:1"));
}

/// Returns a kernel with cooperative matrices that ends with this store. naga panics if the store's index or stride is not a
/// variable.
fn matrices(store: &str) -> String {
    format!(
        "enable f16;\nenable wgpu_cooperative_matrix;\nstruct P {{ n: u32 }}\nvar<immediate> p: P;\n\
         @group(0) @binding(0) var<storage, read> x: array<f16>;\n\
         @group(0) @binding(1) var<storage, read_write> y: array<f32>;\n@compute @workgroup_size(32)\n\
         fn forward() {{\nvar acc: coop_mat16x16<f32, C>;\n\
         let a = coopLoadT<coop_mat16x16<f16, A>>(&x[0], 16u);\n\
         let b = coopLoadT<coop_mat16x16<f16, B>>(&x[0], 16u);\nacc = coopMultiplyAdd(a, b, acc);\n{store}\n}}\n"
    )
}

#[test]
fn cooperative_matrices_skip_hlsl_and_panics_are_caught() {
    assert_eq!(
        problems_of(&matrices("let at = p.n;\nlet stride = p.n;\ncoopStoreT(acc, &y[at], stride);")),
        ""
    );
    let panicked = problems_of(&matrices("coopStoreT(acc, &y[p.n + 16u], p.n);"));
    assert!(panicked.contains("naga panicked"), "{panicked}");
}

#[test]
fn what_other_compilers_refuse_is_a_problem() {
    let of = |body: &str| {
        lint::problems(&format!("alias Elem = f32;\nvar<workgroup> many: u32;\nfn f() {{\n{body}\n}}\n"))
    };
    assert_eq!(of("let z = Elem(0.0);"), [""; 0]);
    assert!(of("let z = Elem();")[0].contains("defines its zero twice"));
    assert_eq!(of("let a = load_lhs(at, k);\nlet v = a[0].xxxx;"), [""; 0]);
    assert!(of("let a = load_lhs(at, k);\nlet v = vec4<f32>(a[0].x);")[0].contains("DXC aborts"));
    let fine = "let a = (x == v) & (y >= w);\nlet b = x & 3u;\nlet c = u < v && w == z;\nlet d = array<vec4<f32>>(x) << 2u;";
    assert_eq!(of(fine), [""; 0]);
    for wrong in ["let a = x == v & y >= w;", "if f(x > y | z) { return; }", "let a = (b & c) == d | e;"] {
        assert!(of(wrong)[0].contains("parentheses"), "{wrong}");
    }
    assert!(
        of("for (var i = 0u; i < many; i++) {\n}\nworkgroupBarrier();")[0].contains("workgroupUniformLoad")
    );
    assert_eq!(of("for (var i = 0u; i < many; i++) {\n}"), [""; 0]);
    let through = "let n = min(many, 3u);\nwhile n > 0u {\n}\nworkgroupBarrier();";
    assert!(of(through)[0].contains("workgroupUniformLoad"));
    let loaded =
        "let n = workgroupUniformLoad(&many);\nfor (var i = 0u; i < n; i++) {\n}\nworkgroupBarrier();";
    assert_eq!(of(loaded), [""; 0]);
}
