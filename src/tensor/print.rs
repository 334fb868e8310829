//! How tensors are printed.

use super::Tensor;
use crate::dtype::DType;
use crate::error::Result;
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
    /// Prints the elements as NumPy does: rows on lines, long axes shortened in the middle. The last line has shape, dtype and
    /// adapter. The format's precision is the number of digits behind the point.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[0.5f32, 2.0], [2]);
    /// assert!(format!("{x:.1}").starts_with("[0.5, 2.0]\n[2] f32 on "));
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(4);
        let text: Result<Vec<String>> = match self.dtype() {
            DType::F32 => self.to_vec::<f32>().map(|v| v.iter().map(|x| format!("{x:.digits$}")).collect()),
            DType::F16 => self
                .to_vec::<half::f16>()
                .map(|v| v.iter().map(|x| format!("{:.digits$}", x.to_f32())).collect()),
            DType::Bf16 => self
                .to_vec::<half::bf16>()
                .map(|v| v.iter().map(|x| format!("{:.digits$}", x.to_f32())).collect()),
            DType::U32 => self.to_vec::<u32>().map(|v| v.iter().map(u32::to_string).collect()),
            DType::I32 => self.to_vec::<i32>().map(|v| v.iter().map(i32::to_string).collect()),
        };
        match text {
            Ok(cells) => {
                print_axes(f, &cells, &self.shape, 0)?;
                write!(f, "\n{} {} on {}", self.shape, self.dtype(), self.gpu().adapter().name)
            }
            Err(error) => write!(f, "<{error}>"),
        }
    }
}

fn print_axes(f: &mut fmt::Formatter<'_>, cells: &[String], shape: &[usize], depth: usize) -> fmt::Result {
    const EDGE: usize = 3;
    let Some((&size, inner)) = shape.split_first() else {
        return f.write_str(cells.first().map_or("", |s| s));
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
        print_axes(f, &cells[i * step..(i + 1) * step], inner, depth + 1)?;
    }
    f.write_str("]")
}
