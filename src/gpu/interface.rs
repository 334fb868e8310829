//! A kernel's bindings and parameters, as naga reads them from its text: names, types, binding numbers and offsets.
//!
//! The host binds and sets by name. Binding numbers and offsets are written in the WGSL only. A launch fails if a name
//! is missing or unknown, if the host writes a binding that the kernel reads or the reverse, or if a parameter has
//! another type.

use super::kernel::{Bind, Param};
use super::shader::{Assembled, Name};
use crate::dtype::DType;
use crate::error::{Error, Result};
use naga::valid::{Capabilities, FunctionInfo, GlobalUse};
use naga::{AddressSpace, Module, Scalar, ScalarKind, StorageAccess, TypeInner};

/// The most bytes of immediates. This is WebGPU's limit, which is below those of Vulkan, Metal and DX12.
const MOST_IMMEDIATE: u32 = 64;
/// The most bytes of parameters in a uniform: the space of one dispatch in the recorder's uniform buffer.
pub(super) const MOST_UNIFORM: u32 = 256;

/// A storage buffer that an entry uses.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Binding {
    pub name: String,
    pub number: u32,
    pub write: bool,
    /// The fewest bytes that may be bound: those of the type, with one element of an array without a length.
    pub least: u64,
    /// The type of its numbers, unless it has matrices or structs.
    scalar: Option<Scalar>,
}

/// A member of the parameters' struct: a scalar or a vector of 32-bit numbers.
#[derive(Clone, Debug, PartialEq)]
struct Field {
    name: String,
    offset: usize,
    kind: ScalarKind,
    components: usize,
}

/// The struct `p` of an entry's parameters.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Params {
    /// The binding number if the parameters are a uniform. `None` for immediates.
    pub uniform: Option<u32>,
    /// Bytes of the struct.
    pub bytes: usize,
    fields: Vec<Field>,
}

/// The bindings and parameters of one entry of a kernel.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Interface {
    pub bindings: Vec<Binding>,
    pub params: Option<Params>,
}

impl Interface {
    /// Returns the interface of the entry with this name.
    pub fn of(assembled: &Assembled, entry: &str) -> Result<Interface> {
        let (module, info) = assembled.check(Capabilities::all())?;
        let at = module.entry_points.iter().position(|point| point.name == entry).ok_or_else(|| {
            let names: Vec<&str> = module.entry_points.iter().map(|point| &*point.name).collect();
            fault(assembled, format!("no entry {entry}; there are: {}", names.join(", ")))
        })?;
        Interface::read(&module, info.get_entry_point(at)).map_err(|message| fault(assembled, message))
    }

    fn read(module: &Module, info: &FunctionInfo) -> Result<Interface, String> {
        let mut interface = Interface::default();
        for (at, variable) in module.global_variables.iter().filter(|(at, _)| info[*at] != GlobalUse::empty())
        {
            let name = variable.name.clone().unwrap_or_default();
            let number = variable.binding.map(|binding| binding.binding);
            match (variable.space, number) {
                (AddressSpace::Storage { access }, Some(number)) => {
                    let write = access.contains(StorageAccess::STORE);
                    let least = module.types[variable.ty].inner.size(module.to_ctx()).into();
                    let scalar = scalar_of(module, &module.types[variable.ty].inner);
                    interface.bindings.push(Binding { name, number, write, least, scalar });
                }
                (AddressSpace::Immediate | AddressSpace::Uniform, uniform) => {
                    if interface.params.is_some() {
                        return Err(format!("{name}: an entry has one struct of parameters"));
                    }
                    interface.params = Some(Params::read(module, at, uniform)?);
                }
                _ => {}
            }
        }
        Ok(interface)
    }

    /// The numbers of the bindings, in the launch's order.
    pub fn numbers(&self, binds: &[Bind]) -> Result<Vec<u32>, String> {
        let find = |(i, bind): (usize, &Bind)| {
            if binds[..i].iter().any(|before| before.name == bind.name) {
                return Err(format!("binds {} twice", bind.name));
            }
            let binding = self.bindings.iter().find(|binding| binding.name == bind.name);
            let Some(binding) = binding else {
                let known = self.bindings.iter().map(|binding| &*binding.name);
                return Err(format!("binds {}, which it does not use; it uses: {}", bind.name, list(known)));
            };
            if binding.write != bind.write {
                let [kernel, host] = [binding.write, bind.write].map(|w| if w { "written" } else { "read" });
                return Err(format!("{} is bound to be {host}, the kernel has it {kernel}", bind.name));
            }
            if bind.part.size < binding.least {
                let (bytes, least) = (bind.part.size, binding.least);
                return Err(format!("binds {bytes} bytes as {}, whose type has at least {least}", bind.name));
            }
            Ok(binding.number)
        };
        let numbers = binds.iter().enumerate().map(find).collect::<Result<Vec<_>, _>>()?;
        if numbers.len() != self.bindings.len() {
            let bound = |binding: &&Binding| binds.iter().all(|bind| bind.name != binding.name);
            let missing = self.bindings.iter().filter(bound).map(|binding| &*binding.name);
            return Err(format!("does not bind {}", list(missing)));
        }
        Ok(numbers)
    }

    /// Checks that every tensor which is bound has the type that the kernel reads or writes.
    pub fn check_types(&self, binds: &[Bind]) -> Result<(), String> {
        for bind in binds {
            let binding = self.bindings.iter().find(|binding| binding.name == bind.name);
            let scalar = binding.and_then(|binding| binding.scalar);
            let (Some(scalar), Some(dtype)) = (scalar, bind.part.dtype) else { continue };
            let fits = match dtype {
                DType::F32 => scalar == Scalar::F32,
                DType::I32 => scalar == Scalar::I32,
                DType::U32 | DType::Bf16 => scalar == Scalar::U32,
                DType::F16 => scalar == Scalar::U32 || scalar == Scalar::F16,
            };
            if !fits {
                let words = if dtype.is_half() { ", of which two are one u32" } else { "" };
                let (name, of) = (&bind.name, name_of(scalar));
                return Err(format!("binds elements of {dtype}{words}, as {name}, which is of {of}"));
            }
        }
        Ok(())
    }
}

/// The type of the numbers in a scalar, a vector, an atomic or an array of them.
fn scalar_of(module: &Module, ty: &TypeInner) -> Option<Scalar> {
    match ty {
        TypeInner::Scalar(scalar) | TypeInner::Vector { scalar, .. } | TypeInner::Atomic(scalar) => {
            Some(*scalar)
        }
        TypeInner::Array { base, .. } => scalar_of(module, &module.types[*base].inner),
        _ => None,
    }
}

fn name_of(scalar: Scalar) -> String {
    let kind = match scalar.kind {
        ScalarKind::Sint => 'i',
        ScalarKind::Float => 'f',
        _ => 'u',
    };
    format!("{kind}{}", 8 * scalar.width)
}

impl Params {
    fn read(
        module: &Module,
        at: naga::Handle<naga::GlobalVariable>,
        uniform: Option<u32>,
    ) -> Result<Params, String> {
        let TypeInner::Struct { members, span } = &module.types[module.global_variables[at].ty].inner else {
            return Err("its parameters are no struct".into());
        };
        let field = |member: &naga::StructMember| {
            let name = member.name.clone().unwrap_or_default();
            let (scalar, components) = match module.types[member.ty].inner {
                TypeInner::Scalar(scalar) => (scalar, 1),
                TypeInner::Vector { size, scalar } => (scalar, size as usize),
                _ => return Err(format!("parameter {name} is neither a number nor a vector")),
            };
            if scalar.width != 4 {
                return Err(format!("parameter {name} is not of 32 bits"));
            }
            Ok(Field { name, offset: member.offset as usize, kind: scalar.kind, components })
        };
        let most = if uniform.is_some() { MOST_UNIFORM } else { MOST_IMMEDIATE };
        if *span > most {
            return Err(format!(
                "its parameters have {span} bytes, more than {most}; above 64 they are a uniform"
            ));
        }
        let fields = members.iter().map(field).collect::<Result<Vec<_>, _>>()?;
        Ok(Params { uniform, bytes: *span as usize, fields })
    }

    /// Returns the parameters as bytes. Each must be set exactly once, except `groups_x`, which is the grid's width by
    /// default.
    pub fn pack(&self, values: &[(Name, Param)], groups_x: u32) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; self.bytes];
        let mut set = 0u64;
        for (i, (name, param)) in values.iter().enumerate() {
            // The host nearly always sets them in the struct's order.
            let at = match self.fields.get(i) {
                Some(field) if field.name == *name => Some(i),
                _ => self.fields.iter().position(|field| field.name == *name),
            };
            let Some(at) = at else {
                let known = self.fields.iter().map(|field| &*field.name);
                return Err(format!("sets {name}, which it does not have; it has: {}", list(known)));
            };
            if set & 1 << at != 0 {
                return Err(format!("sets {name} twice"));
            }
            self.fields[at].put(&mut bytes, param)?;
            set |= 1 << at;
        }
        if set.count_ones() as usize != self.fields.len() {
            for (at, field) in self.fields.iter().enumerate().filter(|(at, _)| set & 1 << at == 0) {
                if field.name != "groups_x" {
                    return Err(format!("does not set {}", field.name));
                }
                self.fields[at].put(&mut bytes, &Param::from(groups_x))?;
            }
        }
        Ok(bytes)
    }

    /// Overwrites one parameter in packed bytes.
    pub fn replace(&self, bytes: &mut [u8], name: &str, param: &Param) -> Result<(), String> {
        match self.fields.iter().find(|field| field.name == name) {
            Some(field) => field.put(bytes, param),
            None => Err(format!("no parameter {name}")),
        }
    }

    /// Reads the words of one parameter from packed bytes.
    pub fn words<const N: usize>(&self, bytes: &[u8], name: &str) -> Option<[u32; N]> {
        let field = self.fields.iter().find(|field| field.name == name && field.components == N)?;
        let word = |i: usize| <[u8; 4]>::try_from(&bytes[field.offset + 4 * i..][..4]).expect("four bytes");
        Some(std::array::from_fn(|i| u32::from_le_bytes(word(i))))
    }
}

impl Field {
    fn put(&self, bytes: &mut [u8], param: &Param) -> Result<(), String> {
        if param.kind != self.kind || param.count != self.components {
            let ty = |kind: ScalarKind, count: usize| {
                let kind = name_of(Scalar { kind, width: 4 });
                if count == 1 { kind } else { format!("vec{count}<{kind}>") }
            };
            let [own, given] = [ty(self.kind, self.components), ty(param.kind, param.count)];
            return Err(format!("sets {} to {given}; it is {own}", self.name));
        }
        for (i, word) in param.words[..param.count].iter().enumerate() {
            bytes[self.offset + 4 * i..][..4].copy_from_slice(&word.to_le_bytes());
        }
        Ok(())
    }
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

fn fault(assembled: &Assembled, message: String) -> Error {
    Error::shader(assembled.locate(0).0, 0, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::shader::Source;

    const TEXT: &str = "struct Params { groups_x: u32, rows: u32, scale: f32, shift: i32, stream: vec2<u32> }
var<immediate> p: Params;
@group(0) @binding(3) var<storage, read> x: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;
@group(0) @binding(6) var<storage, read_write> other: array<f32>;
@compute @workgroup_size(1) fn forward() { y[p.rows] = x[0] * p.scale; }
@compute @workgroup_size(1) fn backward() { other[0] = 1.0; }
";

    fn of(entry: &str) -> Interface {
        Interface::of(&Source::text("t", TEXT).assemble().unwrap(), entry).unwrap()
    }

    #[test]
    fn an_entry_has_what_it_uses() {
        let forward = of("forward");
        let binding = |name: &str, number, write| Binding {
            name: name.into(),
            number,
            write,
            least: 4,
            scalar: Some(Scalar::F32),
        };
        assert_eq!(forward.bindings, [binding("x", 3, false), binding("y", 5, true)]);
        let params = forward.params.unwrap();
        assert_eq!((params.bytes, params.uniform), (24, None));
        assert_eq!(of("backward").params, None);
        let missing = Interface::of(&Source::text("t", TEXT).assemble().unwrap(), "sideways");
        assert!(missing.unwrap_err().to_string().contains("no entry sideways; there are: forward, backward"));
    }

    #[test]
    fn parameters_are_packed_by_name_and_type() {
        let params = of("forward").params.unwrap();
        let set = |values: &[(&'static str, Param)]| {
            let values: Vec<_> = values.iter().map(|(name, param)| (Name::from(*name), *param)).collect();
            params.pack(&values, 7)
        };
        let (rows, scale, shift) =
            (("rows", 3usize.into()), ("scale", 0.5f32.into()), ("shift", (-1i32).into()));
        let stream = ("stream", [8u32, 9].into());
        // In any order.
        let bytes = set(&[scale, stream, rows, shift]).unwrap();
        let words: Vec<u32> = bytes.chunks(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect();
        assert_eq!(words, [7, 3, 0.5f32.to_bits(), u32::MAX, 8, 9]);
        assert_eq!(params.words::<2>(&bytes, "stream"), Some([8, 9]));

        let refused = |values: &[(&'static str, Param)]| set(values).unwrap_err();
        assert_eq!(refused(&[rows, scale, shift]), "does not set stream");
        let known = "it has: groups_x, rows, scale, shift, stream";
        assert_eq!(refused(&[("row", 3usize.into())]), format!("sets row, which it does not have; {known}"));
        assert_eq!(refused(&[rows, rows]), "sets rows twice");
        assert_eq!(refused(&[("rows", 3i32.into())]), "sets rows to i32; it is u32");
        assert_eq!(refused(&[("stream", 3u32.into())]), "sets stream to u32; it is vec2<u32>");
    }
}
