//! Writes the texts that each target's own compiler would get to a folder, for `make check-shaders` (see `docs/drivers.md`).
//!
//! The folder gets one file per kernel with its WGSL, one file per entry point and other language, and `manifest.jsonl`. The
//! manifest describes each file and lists the kernels that a target cannot have.

use super::{MOST_BUFFERS, Written, lint, write_hlsl, write_spirv};
use naga::back::{glsl, hlsl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo};
use naga::{AddressSpace, Module, ShaderStage};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufWriter, Write as _};
use std::path::Path;
use tiebeam::gpu::shader::{Assembled, Source};

/// A writer of one entry point without naga's checks, as in release builds.
type Write = fn(&Module, &ModuleInfo, entry: &str) -> Result<Written, String>;

/// Returns the languages that are written: name, file ending, capabilities of the writer, and the writer.
fn languages() -> [(&'static str, &'static str, Capabilities, Write); 4] {
    [
        ("HLSL", "hlsl", hlsl::supported_capabilities(), |m, i, entry| write_hlsl(m, i, entry, false)),
        // For Vulkan 1.1 and for 1.3 and later.
        ("SPIR-V 1.3", "1.3.spv", spv::supported_capabilities(), |m, i, entry| {
            write_spirv((1, 3), m, i, entry, false)
        }),
        ("SPIR-V 1.6", "1.6.spv", spv::supported_capabilities(), |m, i, entry| {
            write_spirv((1, 6), m, i, entry, false)
        }),
        ("GLSL", "comp", glsl::supported_capabilities(), write_glsl),
    ]
}

/// Writes GLSL ES 3.10 as wgpu does: each kind of binding has its own slots, numbered in order.
fn write_glsl(module: &Module, info: &ModuleInfo, entry: &str) -> Result<Written, String> {
    let mut variables: Vec<_> =
        module.global_variables.iter().filter_map(|(_, v)| Some((v.binding?, v.space))).collect();
    variables.sort_by_key(|(binding, _)| (binding.group, binding.binding));
    let (mut binding_map, mut storage, mut other) = (glsl::BindingMap::default(), 0, 0);
    for (binding, space) in variables {
        let slot = if matches!(space, AddressSpace::Storage { .. }) { &mut storage } else { &mut other };
        binding_map.insert(binding, *slot);
        *slot += 1;
    }
    let options = glsl::Options {
        version: glsl::Version::new_gles(310),
        writer_flags: glsl::WriterFlags::ADJUST_COORDINATE_SPACE | glsl::WriterFlags::FORCE_POINT_SIZE,
        binding_map,
        zero_initialize_workgroup_memory: false,
    };
    let pipeline = glsl::PipelineOptions {
        shader_stage: ShaderStage::Compute,
        entry_point: entry.into(),
        multiview: None,
    };
    let unchecked = BoundsCheckPolicy::Unchecked;
    let policies = BoundsCheckPolicies {
        index: unchecked,
        buffer: unchecked,
        image_load: unchecked,
        binding_array: unchecked,
    };
    let mut text = String::new();
    let writer = glsl::Writer::new(&mut text, module, info, &options, &pipeline, policies);
    writer.and_then(|mut writer| writer.write()).map_err(|e| e.to_string())?;
    Ok(Written { bytes: text.into_bytes(), entry: "main".into() })
}

/// The features that an entry point needs and that some targets lack.
struct Needs {
    matrices: bool,
    f16: bool,
    subgroups: bool,
    buffers: usize,
}

impl Needs {
    fn of(text: &str, module: &Module, info: &ModuleInfo, entry: usize) -> Needs {
        let info = info.get_entry_point(entry);
        let storage = |space| matches!(space, AddressSpace::Storage { .. });
        let used = module.global_variables.iter().filter(|(at, v)| storage(v.space) && !info[*at].is_empty());
        let first = text.lines().next().unwrap_or("");
        Needs {
            matrices: first.contains("enable wgpu_cooperative_matrix;"),
            f16: first.contains("enable f16;"),
            subgroups: lint::code(text).any(|(_, line)| line.contains("subgroup")),
            buffers: used.count(),
        }
    }

    /// Returns the reason why a target cannot have the kernel, or `None` if it can.
    fn missing(&self, language: &str) -> Option<String> {
        let elsewhere = matches!(language, "HLSL" | "GLSL" | "WGSL");
        if elsewhere && self.matrices {
            return Some("cooperative matrices".into());
        }
        match language {
            "GLSL" if self.f16 => Some("16-bit floats".into()),
            "GLSL" if self.subgroups => Some("subgroups".into()),
            "GLSL" | "WGSL" if self.buffers > MOST_BUFFERS => {
                Some(format!("more than {MOST_BUFFERS} storage buffers"))
            }
            _ => None,
        }
    }

    /// Returns the WebGPU features that a browser must have for this entry point.
    fn features(&self) -> Vec<&str> {
        let all = [(self.f16, "shader-f16"), (self.subgroups, "subgroups")];
        all.into_iter().filter_map(|(needed, name)| needed.then_some(name)).collect()
    }
}

/// Returns the bytes of a kernel's `var<immediate>`.
fn immediates(module: &Module) -> u32 {
    let variables = module.global_variables.iter().filter(|(_, v)| v.space == AddressSpace::Immediate);
    variables.map(|(_, v)| module.types[v.ty].inner.size(module.to_ctx())).sum()
}

/// Writes all variants. Variants with the same text are written once.
pub fn all(variants: &[Source], folder: &Path) {
    std::fs::create_dir_all(folder).expect("TIEBEAM_DUMP_SHADERS names a folder");
    let mut manifest = BufWriter::new(File::create(folder.join("manifest.jsonl")).expect("a file in it"));
    let mut seen = HashSet::new();
    for source in variants {
        let assembled = source.assemble().expect("the test that translates all has assembled it");
        if seen.insert(assembled.text().to_string()) {
            for record in kernel(source, &assembled, folder) {
                writeln!(manifest, "{record}").expect("room for a line");
            }
        }
    }
    manifest.flush().expect("room for the manifest");
}

/// Writes one kernel and returns its lines of the manifest.
fn kernel(source: &Source, assembled: &Assembled, folder: &Path) -> Vec<Value> {
    let mut hash = DefaultHasher::new();
    assembled.text().hash(&mut hash);
    let stem = format!("{}-{:016x}", source.name(), hash.finish());
    let keep = |file: String, bytes: &[u8]| {
        std::fs::write(folder.join(&file), bytes).expect("room for a kernel");
        file
    };
    let mut records = Vec::new();
    let mut add = |language: &str, point: &str, more: Value| {
        let mut record = json!({ "language": language, "kernel": source.name(), "variant": source.lines().join(" + "), "point": point });
        record.as_object_mut().expect("an object").append(&mut more.as_object().expect("an object").clone());
        records.push(record);
    };
    let (module, info) =
        assembled.check(Capabilities::all()).expect("the test that translates all has checked it");
    let wgsl = keep(format!("{stem}.wgsl"), assembled.text().as_bytes());
    for (i, point) in module.entry_points.iter().enumerate() {
        let needs = Needs::of(assembled.text(), &module, &info, i);
        add(
            "WGSL",
            &point.name,
            match needs.missing("WGSL") {
                Some(reason) => json!({ "not_for": reason }),
                None => {
                    json!({ "file": wgsl, "entry": point.name, "features": needs.features(), "immediates": immediates(&module) })
                }
            },
        );
        for (language, ending, capabilities, write) in languages() {
            if let Some(reason) = needs.missing(language) {
                add(language, &point.name, json!({ "not_for": reason }));
                continue;
            }
            let checked = assembled.check(capabilities).map_err(|e| e.to_string());
            match checked.and_then(|(module, info)| write(&module, &info, &point.name)) {
                Ok(written) => {
                    let file = keep(format!("{stem}@{}.{ending}", point.name), &written.bytes);
                    add(language, &point.name, json!({ "file": file, "entry": written.entry }));
                }
                Err(words) => add(language, &point.name, json!({ "refused": format!("naga: {words}") })),
            }
        }
    }
    records
}
