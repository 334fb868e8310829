//! The class of a device: the numbers by which kernels are chosen.
//!
//! The numbers come from a table by vendor and kind. A test can ask for any row without having such a device
//! ([`DeviceClass::named`]). `tiebeam tune` measures some of the numbers and keeps them with its choices of kernels.
//! Limits, features and the lanes of a subgroup are asked of the adapter.

use super::AdapterSummary;
use crate::error::{Error, Result};

/// Where a device's processors and memory are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceKind {
    /// The host's own processor, by a driver that compiles kernels for it.
    Cpu,
    /// A GPU that shares the host's memory.
    Integrated,
    /// A card with memory of its own.
    Discrete,
    /// A GPU that a hypervisor offers to a virtual machine.
    Virtual,
}

/// Where matrix products keep their tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Tiles {
    /// Large tiles in a thread's registers, with operands read straight from storage. For CPU drivers, where workgroup
    /// memory is ordinary memory.
    Registers,
    /// Tiles in workgroup memory that the threads of a workgroup share.
    Workgroup,
}

/// The numbers by which kernels are chosen.
///
/// They decide which kernel runs and how work is divided, and so the order of sums and the last bits of results. They
/// do not decide what is allowed.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DeviceClass {
    /// The name of its row in the table, usable as `TIEBEAM_DEVICE`.
    pub name: &'static str,
    /// Where its processors are.
    pub kind: DeviceKind,
    /// Multiprocessors (NVIDIA), compute units (AMD) or cores (Intel's Xe, Apple). On a CPU, the number of workgroups
    /// that should run side by side.
    pub width: u32,
    /// Threads to keep in flight on each of them.
    pub threads: u32,
    /// Lanes of a subgroup: as in the table, or on an open device the most that its adapter has.
    pub lanes: u32,
    /// Bytes of workgroup memory: as in the table, or on an open device the adapter's limit.
    pub workgroup_memory: u32,
    /// 32-bit registers that a thread may use without a penalty. CPUs have a high number, because spilled registers
    /// stay in the nearest cache.
    pub registers: u32,
    /// Which tiles make products.
    pub tiles: Tiles,
    /// Bytes of an intermediate result that are in memory at a time, in ops that compute it chunk by chunk.
    pub chunk: u64,
    /// Seconds that an empty dispatch takes.
    pub dispatch: f64,
    /// The cost of a workgroup barrier, as the number of elements that a thread could read instead.
    pub barrier: u32,
    /// Whether a large kernel takes seconds to compile.
    pub slow_compiler: bool,
    /// Bytes read and written per second.
    pub bytes_s: f64,
    /// f32 operations per second. A multiply-add counts as two.
    pub flops_s: f64,
    /// Seconds of work in one submit: enough to hide the cost of the submit, and little enough to keep the device fed.
    pub submit: f64,
}

/// A further workgroup is only worthwhile if it has at least this many bytes of operands or this many operations.
const LEAST_BYTES: f64 = 65_536.0;
const LEAST_FLOPS: f64 = 1e6;

impl DeviceClass {
    /// The longest that one dispatch should take, in seconds. Some drivers kill a dispatch after two seconds, and
    /// screens freeze before that.
    pub(crate) const LONGEST: f64 = 0.5;

    /// Threads that keep the whole device busy.
    pub fn in_flight(&self) -> usize {
        self.width as usize * self.threads as usize
    }

    /// Returns how many workgroups of `threads` threads keep the device busy, but no more than there is work for: each
    /// should have 64 KiB of operands, with each byte counted once, or a million operations.
    pub fn wanted(&self, threads: usize, bytes: f64, flops: f64) -> usize {
        let busy = self.in_flight().div_ceil(threads.max(1));
        let worth = (bytes / LEAST_BYTES).max(flops / LEAST_FLOPS);
        busy.min(worth as usize).max(1)
    }

    /// Whether barriers are so costly that lanes should share a row only if the device cannot be kept busy otherwise.
    pub fn has_dear_barriers(&self) -> bool {
        self.barrier >= 64
    }

    /// Whether threads may hold tiles so large that a GPU would spill them.
    pub fn has_many_registers(&self) -> bool {
        self.registers >= 256
    }

    /// Whether the device computes on the host's own cores.
    pub fn is_cpu(&self) -> bool {
        self.kind == DeviceKind::Cpu
    }

    /// Estimates the seconds of a dispatch that moves this many bytes and does this many operations.
    pub fn seconds(&self, bytes: f64, flops: f64) -> f64 {
        self.dispatch + (bytes / self.bytes_s).max(flops / self.flops_s)
    }

    /// Returns the row of this name, in any case: a kind (`cpu`, `integrated`, `discrete`, `virtual`) or one of the
    /// finer rows.
    ///
    /// # Errors
    /// [`Error::Config`], which lists the names, if there is no such row.
    ///
    /// ```
    /// use tiebeam::gpu::DeviceClass;
    /// assert_eq!(DeviceClass::named("h200")?.width, 132);
    /// assert!(DeviceClass::named("toaster").is_err());
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn named(name: &str) -> Result<DeviceClass> {
        let row = TABLE.iter().find(|row| row.class.name.eq_ignore_ascii_case(name.trim()));
        row.map(|row| row.class.clone()).ok_or_else(|| {
            let all: Vec<&str> = TABLE.iter().map(|row| row.class.name).collect();
            Error::config(format!(
                "'{name}' is no class of devices (Options::device, TIEBEAM_DEVICE); there are auto, {}",
                all.join(", ")
            ))
        })
    }

    /// Every row of the table.
    pub fn all() -> Vec<DeviceClass> {
        TABLE.iter().map(|row| row.class.clone()).collect()
    }

    /// Returns the first row that the adapter fits, by its vendor, its kind and a word in its name.
    pub(super) fn of(adapter: &AdapterSummary) -> DeviceClass {
        TABLE.iter().find(|row| row.fits(adapter)).unwrap_or(&TABLE[TABLE.len() - 1]).class.clone()
    }
}

/// A class, and which adapters belong to it.
struct Row {
    /// PCI ids of vendors, or Vulkan's ids for vendors without one. Empty means any vendor.
    vendors: &'static [u32],
    /// Part of the adapter's name, in lower case.
    word: &'static str,
    /// The adapter's [`AdapterSummary::kind`]. Empty means any kind.
    kind: &'static str,
    class: DeviceClass,
}

impl Row {
    fn fits(&self, adapter: &AdapterSummary) -> bool {
        (self.vendors.is_empty() || self.vendors.contains(&adapter.vendor))
            && adapter.name.to_lowercase().contains(self.word)
            && (self.kind.is_empty() || self.kind == adapter.kind)
    }
}

/// A discrete GPU of unknown size.
const DISCRETE: DeviceClass = DeviceClass {
    name: "discrete",
    kind: DeviceKind::Discrete,
    width: 40,
    threads: 512,
    lanes: 32,
    workgroup_memory: 32 << 10,
    registers: 128,
    tiles: Tiles::Workgroup,
    chunk: 128 << 20,
    dispatch: 4e-6,
    barrier: 4,
    slow_compiler: false,
    bytes_s: 3e11,
    flops_s: 8e12,
    submit: 2e-3,
};

/// A small GPU that shares the host's memory. Unknown devices count as this class.
const INTEGRATED: DeviceClass = DeviceClass {
    name: "integrated",
    kind: DeviceKind::Integrated,
    width: 8,
    chunk: 32 << 20,
    dispatch: 8e-6,
    bytes_s: 2.5e10,
    flops_s: 4e11,
    submit: 2e-2,
    ..DISCRETE
};

/// A driver that runs kernels on the host's cores. A workgroup's threads are the lanes of wide vectors, taken in loops.
const CPU: DeviceClass = DeviceClass {
    name: "cpu",
    kind: DeviceKind::Cpu,
    width: 8,
    threads: 32,
    lanes: 8,
    registers: 512,
    tiles: Tiles::Registers,
    chunk: 4 << 20,
    dispatch: 1e-5,
    barrier: 128,
    slow_compiler: true,
    bytes_s: 8e9,
    flops_s: 6e10,
    // lavapipe takes no second submit before the first is done. So submits are few, but well below a second each.
    submit: 0.25,
    ..DISCRETE
};

const NVIDIA: &[u32] = &[0x10de];
const AMD: &[u32] = &[0x1002, 0x1022];
const INTEL: &[u32] = &[0x8086];

const fn row(vendors: &'static [u32], word: &'static str, kind: &'static str, class: DeviceClass) -> Row {
    Row { vendors, word, kind, class }
}

/// Rows from the finest to the coarsest. An adapter belongs to the first row that it fits.
static TABLE: [Row; 13] = [
    // Measured on an H200: see docs/benchmark.md.
    row(
        NVIDIA,
        "h200",
        "",
        DeviceClass {
            name: "h200",
            width: 132,
            workgroup_memory: 48 << 10,
            dispatch: 3e-6,
            bytes_s: 3.3e12,
            flops_s: 6.4e13,
            ..DISCRETE
        },
    ),
    row(
        NVIDIA,
        "",
        "discrete",
        DeviceClass { name: "nvidia", width: 46, workgroup_memory: 48 << 10, flops_s: 1.2e13, ..DISCRETE },
    ),
    // Waves have 64 lanes.
    row(AMD, "", "discrete", DeviceClass { name: "amd", width: 60, lanes: 64, flops_s: 1e13, ..DISCRETE }),
    row(
        AMD,
        "",
        "integrated",
        DeviceClass { name: "amd-integrated", lanes: 64, bytes_s: 4e10, flops_s: 1e12, ..INTEGRATED },
    ),
    row(INTEL, "", "discrete", DeviceClass { name: "intel-discrete", width: 28, ..DISCRETE }),
    row(INTEL, "", "integrated", DeviceClass { name: "intel", width: 12, bytes_s: 3e10, ..INTEGRATED }),
    // Metal reports no vendor.
    row(
        &[],
        "apple",
        "integrated",
        DeviceClass { name: "apple", width: 10, bytes_s: 6e10, flops_s: 2e12, ..INTEGRATED },
    ),
    row(&[], "llvmpipe", "software", DeviceClass { name: "llvmpipe", ..CPU }),
    row(&[], "swiftshader", "software", DeviceClass { name: "swiftshader", lanes: 4, ..CPU }),
    row(&[], "", "software", CPU),
    row(&[], "", "discrete", DISCRETE),
    row(
        &[],
        "",
        "virtual",
        DeviceClass { name: "virtual", kind: DeviceKind::Virtual, width: 16, ..INTEGRATED },
    ),
    row(&[], "", "", INTEGRATED),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(vendor: u32, name: &str, kind: &'static str) -> AdapterSummary {
        AdapterSummary {
            index: 0,
            name: name.into(),
            backend: "Vulkan".into(),
            kind,
            vendor,
            driver: String::new(),
            max_buffer: 0,
            max_binding: 0,
            features: vec![],
        }
    }

    #[test]
    fn adapters_find_their_rows() {
        for (vendor, name, kind, want) in [
            (0x10de, "NVIDIA H200", "discrete", "h200"),
            (0x10de, "NVIDIA GeForce RTX 3060", "discrete", "nvidia"),
            (0x1002, "AMD Radeon RX 7900 XTX (RADV NAVI31)", "discrete", "amd"),
            (0x1002, "AMD Radeon 780M", "integrated", "amd-integrated"),
            (0x8086, "Intel(R) Arc(TM) A770 Graphics", "discrete", "intel-discrete"),
            (0x8086, "Intel(R) UHD Graphics 620 (KBL GT2)", "integrated", "intel"),
            (0, "Apple M2", "integrated", "apple"),
            (0x10005, "llvmpipe (LLVM 15.0.6, 256 bits)", "software", "llvmpipe"),
            (0x1ae0, "SwiftShader Device (Subzero)", "software", "swiftshader"),
            (0x1414, "Microsoft Basic Render Driver", "software", "cpu"),
            (0x1010, "PowerVR", "discrete", "discrete"),
            (0x1af4, "Virtio-GPU Venus", "virtual", "virtual"),
            (0x13b5, "Mali-G78", "integrated", "integrated"),
            (0, "what nobody has seen", "other", "integrated"),
        ] {
            assert_eq!(DeviceClass::of(&adapter(vendor, name, kind)).name, want, "{name}");
        }
    }

    #[test]
    fn names_are_words_for_one_row_each() {
        let all = DeviceClass::all();
        for class in &all {
            assert_eq!(DeviceClass::named(&class.name.to_uppercase()).unwrap(), *class);
            assert_eq!(all.iter().filter(|other| other.name == class.name).count(), 1, "{}", class.name);
        }
        let said = DeviceClass::named("h 200").unwrap_err().to_string();
        assert!(
            said.contains("'h 200' is no class of devices (Options::device, TIEBEAM_DEVICE); there are auto, h200, nvidia, "),
            "{said}"
        );
    }

    #[test]
    fn work_is_cut_until_the_device_is_full_or_a_workgroup_has_little() {
        let h200 = DeviceClass::named("h200").unwrap();
        assert_eq!([h200.wanted(256, 1e12, 0.0), h200.wanted(64, 1e12, 0.0)], [264, 1056]);
        assert_eq!(
            [h200.wanted(64, 65_536.0 * 9.5, 0.0), h200.wanted(64, 0.0, 7.9e6), h200.wanted(64, 1.0, 1.0)],
            [9, 7, 1]
        );
    }
}
