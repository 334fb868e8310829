//! How tensors are printed.

use super::Tensor;
use crate::dtype::DType;
use crate::error::Result;
use crate::tape::no_grad;
use std::fmt;

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grad = if self.is_leaf() {
            ", leaf"
        } else if self.is_tracked() {
            ", tracked"
        } else {
            ""
        };
        write!(f, "Tensor({}, {}{grad}, {})", self.shape, self.dtype(), self.gpu().adapter().name)
    }
}

impl fmt::Display for Tensor {
    /// Prints the elements as NumPy does: rows on lines, axes of more than eight shortened in the middle. Floats have four digits
    /// behind the point, or the format's precision, and a power of ten if the largest is below 0.001 or from 1e7 on. The last line
    /// has shape, dtype and adapter.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[0.5f32, 2.0], [2]);
    /// assert!(format!("{x:.1}").starts_with("[0.5, 2.0]\n[2] f32 on "));
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.elements(f.precision().unwrap_or(4)) {
            Ok(elements) => {
                print_axes(f, &elements, 0, &self.shape, 0)?;
                write!(f, "\n{} {} on {}", self.shape, self.dtype(), self.gpu().adapter().name)
            }
            Err(error) => write!(f, "<{error}>"),
        }
    }
}

/// The text of an element.
type Elements = Box<dyn Fn(usize) -> String>;

impl Tensor {
    /// Reads all elements. Each becomes a text only when it is printed.
    fn elements(&self, digits: usize) -> Result<Elements> {
        Ok(match self.dtype() {
            DType::F32 => floats(self.to_vec()?, digits),
            DType::F16 | DType::Bf16 => floats(no_grad(|| self.cast(DType::F32)).to_vec()?, digits),
            DType::U32 => self.to_vec::<u32>().map(|all| Box::new(move |i: usize| all[i].to_string()))?,
            DType::I32 => self.to_vec::<i32>().map(|all| Box::new(move |i: usize| all[i].to_string()))?,
        })
    }
}

fn floats(all: Vec<f32>, digits: usize) -> Elements {
    let sizes = all.iter().map(|x| x.abs()).filter(|x| x.is_finite());
    let largest = sizes.fold(0.0, f32::max);
    let is_plain = largest == 0.0 || (1e-3..1e7).contains(&largest);
    Box::new(move |i| if is_plain { format!("{:.digits$}", all[i]) } else { format!("{:.digits$e}", all[i]) })
}

fn print_axes(
    f: &mut fmt::Formatter<'_>,
    elements: &Elements,
    start: usize,
    shape: &[usize],
    depth: usize,
) -> fmt::Result {
    const EDGE: usize = 3;
    let Some((&size, inner)) = shape.split_first() else {
        return f.write_str(&elements(start));
    };
    let step: usize = inner.iter().product();
    f.write_str("[")?;
    let mut first = true;
    for i in 0..size {
        if size > 2 * EDGE + 2 && i >= EDGE && i < size - EDGE {
            if i == EDGE {
                f.write_str(if inner.is_empty() { ", ..." } else { ",\n" })?;
                if !inner.is_empty() {
                    write!(f, "{:1$}...", "", depth + 1)?;
                }
            }
            continue;
        }
        if !first {
            match inner.is_empty() {
                true => f.write_str(", ")?,
                false => write!(f, ",\n{:1$}", "", depth + 1)?,
            }
        }
        first = false;
        print_axes(f, elements, start + i * step, inner, depth + 1)?;
    }
    f.write_str("]")
}
