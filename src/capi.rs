//! The C ABI of a calculator (feature `capi`); `include/tiebeam.h` is its documentation for C.
//!
//! No panic crosses the boundary: it becomes an error with the panic's message. No result is written unless the whole
//! call succeeds.

use crate::error::{Error, Result, panic_text};
use crate::geometry::vectors::Vec3;
use crate::geometry::{Calculator, Cell};
use crate::gpu::Gpu;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;

/// The version of these functions, `TIEBEAM_ABI` in the header.
const ABI: u32 = 1;

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs `work` and keeps the message of its error or panic for [`tiebeam_error`].
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Option<T> {
    let message = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => return Some(value),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => {
            format!("tiebeam: a bug, please report it: {}", panic_text(&*panic))
        }
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    LAST.with(|last| *last.borrow_mut() = message);
    None
}

/// The version of these functions.
#[unsafe(no_mangle)]
pub extern "C" fn tiebeam_abi() -> u32 {
    ABI
}

/// The message of the last call that failed on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn tiebeam_error() -> *const c_char {
    LAST.with(|last| last.borrow().as_ptr())
}

/// Reads a potential. Returns null after an error.
///
/// # Safety
/// `path` is null or ends in a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tiebeam_open(path: *const c_char) -> *mut Calculator {
    let opened = guarded(|| {
        if path.is_null() {
            return Err(Error::config("tiebeam_open: the path is NULL"));
        }
        // SAFETY: the caller's promise.
        let path = unsafe { CStr::from_ptr(path) };
        let path = path.to_str().map_err(|_| Error::config("tiebeam_open: the path is not UTF-8"))?;
        Calculator::load(&Gpu::open()?, path)
    });
    opened.map_or(std::ptr::null_mut(), |calculator| Box::into_raw(Box::new(calculator)))
}

/// Frees a calculator.
///
/// # Safety
/// `calculator` is null or came from [`tiebeam_open`] and was not closed, and no other thread uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tiebeam_close(calculator: *mut Calculator) {
    if !calculator.is_null() {
        // SAFETY: the caller's promise; `tiebeam_open` made it by `Box::into_raw`.
        let calculator = unsafe { Box::from_raw(calculator) };
        guarded(|| {
            drop(calculator);
            Ok(())
        });
    }
}

/// The cutoff radius of the potential. 0 if it has none, and after an error.
///
/// # Safety
/// `calculator` is null or open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tiebeam_radius(calculator: *const Calculator) -> f64 {
    // SAFETY: the caller's promise.
    let calculator = unsafe { calculator.as_ref() };
    calculator.and_then(|c| c.potential().net.config.radius).map_or(0.0, f64::from)
}

/// The number of layers, which is the number of radii that a message travels.
///
/// # Safety
/// `calculator` is null or open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tiebeam_layers(calculator: *const Calculator) -> u32 {
    // SAFETY: the caller's promise.
    let calculator = unsafe { calculator.as_ref() };
    calculator.map_or(0, |c| c.potential().net.config.layers as u32)
}

/// Makes results averages over this many rotations. Returns 0, or 1 after an error.
///
/// # Safety
/// `calculator` is null or open, and no other thread uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tiebeam_set_rotations(calculator: *mut Calculator, count: u32) -> c_int {
    let set = guarded(|| {
        // SAFETY: the caller's promise.
        let calculator = unsafe { calculator.as_mut() };
        let calculator =
            calculator.ok_or_else(|| Error::config("tiebeam_set_rotations: the calculator is NULL"))?;
        if count == 0 {
            return Err(Error::config("tiebeam_set_rotations: 0 rotations have no average; use 1 or more"));
        }
        calculator.set_rotations(count as usize);
        Ok(())
    });
    set.is_none() as c_int
}

/// Returns the `count` elements at `at`, or an error that names the argument.
///
/// # Safety
/// `at` is null or points to `count` elements, which nobody changes in the meantime.
unsafe fn list<'a, T>(name: &str, at: *const T, count: usize) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if at.is_null() || count > isize::MAX as usize / size_of::<T>() {
        return Err(Error::config(format!(
            "tiebeam_compute: `{name}` is NULL, or {count} elements are too many"
        )));
    }
    // SAFETY: the caller's promise; the size fits.
    Ok(unsafe { slice::from_raw_parts(at, count) })
}

/// # Safety
/// `to` is null or has room for as many elements as `from`.
unsafe fn write(to: *mut f64, from: &[f64]) {
    if !to.is_null() {
        // SAFETY: the caller's promise, and the two ranges do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }
}

/// Computes energy, forces and stress. Returns 0, or 1 after an error.
///
/// # Safety
/// `calculator` is null or open. The other pointers are null or point to as many elements as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tiebeam_compute(
    calculator: *const Calculator,
    atoms: usize,
    positions: *const f64,
    numbers: *const i32,
    cell: *const f64,
    periodic: *const u8,
    energy: *mut f64,
    atom_energies: *mut f64,
    forces: *mut f64,
    stress: *mut f64,
) -> c_int {
    let found = guarded(|| {
        // SAFETY: the caller's promise.
        let calculator = unsafe { calculator.as_ref() };
        let calculator =
            calculator.ok_or_else(|| Error::config("tiebeam_compute: the calculator is NULL"))?;
        let coordinates = atoms
            .checked_mul(3)
            .ok_or_else(|| Error::config(format!("tiebeam_compute: {atoms} atoms are too many")))?;
        // SAFETY: the caller's promise.
        let positions = unsafe { list("positions", positions, coordinates)? };
        // SAFETY: the caller's promise.
        let numbers = unsafe { list("numbers", numbers, atoms)? };
        let species = |&z: &i32| {
            u8::try_from(z).map_err(|_| Error::config(format!("tiebeam_compute: no element has number {z}")))
        };
        let species: Vec<u8> = numbers.iter().map(species).collect::<Result<_>>()?;
        let positions: Vec<Vec3> = positions.as_chunks::<3>().0.to_vec();
        let cell = match cell.is_null() {
            true => None,
            // SAFETY: the caller's promise.
            false => Some(unsafe { read_cell(cell, periodic)? }),
        };
        let found = calculator.energy_forces(&positions, &species, cell)?;
        if !stress.is_null() && found.stress.is_none() {
            return Err(Error::config(
                "tiebeam_compute: stress needs a cell that is periodic along all vectors",
            ));
        }
        Ok(found)
    });
    let Some(found) = found else { return 1 };
    // SAFETY: the caller's promise on each.
    unsafe {
        write(energy, &[found.energy]);
        write(atom_energies, &found.atom_energies);
        write(forces, found.forces.as_flattened());
        write(stress, found.stress.unwrap_or_default().as_flattened());
    }
    0
}

/// # Safety
/// `cell` points to 9 numbers, `periodic` is null or points to 3.
unsafe fn read_cell(cell: *const f64, periodic: *const u8) -> Result<Cell> {
    // SAFETY: the caller's promise.
    let cell = unsafe { list("cell", cell, 9)? };
    let periodic = match periodic.is_null() {
        true => [true; 3],
        false => {
            // SAFETY: the caller's promise.
            let flags = unsafe { list("periodic", periodic, 3)? };
            std::array::from_fn(|i| flags[i] != 0)
        }
    };
    Ok(Cell { vectors: std::array::from_fn(|i| std::array::from_fn(|k| cell[3 * i + k])), periodic })
}
