//! Einstein's notation: sums of products over named axes. Operands are joined from left to right, each pair by one batched
//! matrix product, which reads transposed views in place.

use crate::dtype::DType;
use crate::ops::case::{Array, Case, Input};
use crate::precision::precision;
use crate::shape::{self, MAX_AXES, Shape, Strides};
use crate::tensor::{Tensor, same_gpu};

/// The names of axes. A letter is one of the equation's. A digit is an axis under `...`, counted from the last one.
type Labels = Vec<char>;

/// An equation, with a label for each axis of each operand and of the result.
struct Equation {
    inputs: Vec<Labels>,
    output: Labels,
}

/// Labels of the last `count` axes under `...`.
fn dots(count: usize) -> impl Iterator<Item = char> {
    (0..count as u32).rev().filter_map(|axis| char::from_digit(axis, 10))
}

impl Equation {
    #[track_caller]
    fn of(equation: &str, shapes: &[Shape]) -> Equation {
        let text: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
        let (left, right) = match text.split_once("->") {
            Some((left, right)) => (left, Some(right)),
            None => (&text[..], None),
        };
        let terms: Vec<&str> = left.split(',').collect();
        let (named, given) = (terms.len(), shapes.len());
        assert!(named == given, "einsum: {equation:?} has {named} operands, but {given} are given");
        let inputs: Vec<Labels> =
            terms.iter().enumerate().map(|(i, term)| labels(equation, i, term, &shapes[i])).collect();
        let all: Labels = inputs.iter().flatten().copied().collect();
        let under_dots = all.iter().filter_map(|c| c.to_digit(10)).max().map_or(0, |axis| axis as usize + 1);
        let output = match right {
            Some(right) => explicit(equation, right, &all, under_dots),
            None => {
                let once =
                    |c: &char| c.is_alphabetic() && all.iter().filter(|other| *other == c).count() == 1;
                let mut letters: Labels = all.iter().copied().filter(once).collect();
                letters.sort_unstable();
                dots(under_dots).chain(letters).collect()
            }
        };
        check_sizes(equation, &inputs, shapes);
        Equation { inputs, output }
    }
}

/// The labels of operand `i`.
#[track_caller]
fn labels(equation: &str, i: usize, term: &str, shape: &Shape) -> Labels {
    let (before, after) = term.split_once("...").map_or((term, None), |(b, a)| (b, Some(a)));
    let letters = before.len() + after.map_or(0, str::len);
    let free = shape.len().saturating_sub(letters);
    let fits = if after.is_some() { letters <= shape.len() } else { letters == shape.len() };
    let wanted = before.chars().chain(after.unwrap_or("").chars()).find(|c| !c.is_ascii_alphabetic());
    if let Some(other) = wanted {
        panic!("einsum: {other:?} in {equation:?}; operands are letters and at most one `...` each");
    }
    let axes = shape.len();
    assert!(
        fits,
        "einsum: `{term}` names {letters} axes, but operand {i} of {equation:?} has {axes}: {shape}"
    );
    let under_dots = dots(if after.is_some() { free } else { 0 });
    before.chars().chain(under_dots).chain(after.unwrap_or("").chars()).collect()
}

/// The labels of the result, if the equation says them.
#[track_caller]
fn explicit(equation: &str, right: &str, all: &[char], under_dots: usize) -> Labels {
    let (before, after) = right.split_once("...").map_or((right, None), |(b, a)| (b, Some(a)));
    assert!(
        under_dots == 0 || after.is_some(),
        "einsum: `...` of the operands of {equation:?} is not in the result; write it there, or letters to sum over"
    );
    let letters = before.chars().chain(after.unwrap_or("").chars());
    for (i, letter) in letters.clone().enumerate() {
        let is_known = letter.is_ascii_alphabetic() && all.contains(&letter);
        assert!(is_known, "einsum: `{letter}` in the result of {equation:?} is in no operand");
        let is_first = !letters.clone().take(i).any(|other| other == letter);
        assert!(is_first, "einsum: `{letter}` is twice in the result of {equation:?}");
    }
    before.chars().chain(dots(under_dots)).chain(after.unwrap_or("").chars()).collect()
}

/// A letter has one size everywhere. Axes under `...` broadcast.
#[track_caller]
fn check_sizes(equation: &str, inputs: &[Labels], shapes: &[Shape]) {
    let mut known: Vec<(char, usize, usize)> = Vec::new();
    for (i, (labels, shape)) in inputs.iter().zip(shapes).enumerate() {
        for (&label, &size) in labels.iter().zip(&shape[..]) {
            let is_dots = label.is_ascii_digit();
            match known.iter_mut().find(|(other, ..)| *other == label) {
                None => known.push((label, size, i)),
                Some(found) if is_dots && (found.1 == 1 || size == 1) => {
                    if found.1 == 1 {
                        *found = (label, size, i);
                    }
                }
                Some(&mut (_, first, operand)) => {
                    let name = if is_dots { "an axis under ...".into() } else { format!("`{label}`") };
                    assert!(
                        first == size,
                        "einsum: {name} is {first} in operand {operand} and {size} in operand {i} of {equation:?}"
                    );
                }
            }
        }
    }
}

/// A tensor whose axes have labels.
struct Term {
    x: Tensor,
    labels: Labels,
}

impl Term {
    /// Takes the diagonal of axes with the same label.
    fn of(x: &Tensor, labels: &[char]) -> Term {
        let mut term = Term { x: x.clone(), labels: labels.to_vec() };
        let again = |labels: &[char]| {
            (1..labels.len()).find_map(|b| Some((labels[..b].iter().position(|a| *a == labels[b])?, b)))
        };
        while let Some((a, b)) = again(&term.labels) {
            term.x = diagonal(&term.x, a, b);
            term.labels.remove(b);
        }
        term
    }

    fn has(&self, label: char) -> bool {
        self.labels.contains(&label)
    }

    /// Sums over the axes that are not wanted.
    fn only(self, wanted: impl Fn(char) -> bool) -> Term {
        let axes: Vec<isize> =
            (0..self.labels.len()).filter(|&a| !wanted(self.labels[a])).map(|a| a as isize).collect();
        if axes.is_empty() {
            return self;
        }
        Term { x: self.x.sum(&axes[..]), labels: self.labels.into_iter().filter(|&l| wanted(l)).collect() }
    }

    /// Its axes in this order of labels. A view.
    fn ordered(&self, order: &[char]) -> Tensor {
        let place = |label: &char| self.labels.iter().position(|own| own == label);
        self.x.permute(order.iter().filter_map(place).collect::<Vec<_>>())
    }

    /// Multiplies with `other` and sums over the labels that both have and nobody needs later.
    #[track_caller]
    fn times(&self, other: &Term, later: impl Fn(char) -> bool) -> Term {
        let labels = |of: &Term, is: &dyn Fn(char) -> bool| -> Labels {
            of.labels.iter().copied().filter(|&label| is(label)).collect()
        };
        let batch = labels(self, &|label| other.has(label) && later(label));
        let inner = labels(self, &|label| other.has(label) && !later(label));
        let rows = labels(self, &|label| !other.has(label));
        let columns = labels(other, &|label| !self.has(label));
        let result = [&batch[..], &rows, &columns].concat();
        let count = result.len();
        assert!(
            count <= MAX_AXES,
            "einsum: {result:?} are {count} axes of one tensor, which has at most {MAX_AXES}"
        );
        let left = self.ordered(&[&batch[..], &rows, &inner].concat());
        let right = other.ordered(&[&batch[..], &inner, &columns].concat());
        let [b, m, k, n] = [batch.len(), rows.len(), inner.len(), columns.len()];
        if k == 0 {
            let half = precision().dtype().is_half();
            let left = (0..n).fold(left, |x, _| x.unsqueeze(-1));
            let right = (0..m).fold(right, |x, _| x.unsqueeze(b as isize));
            // As a product with a sum: two of 16 bits give f32, outside of a scope of 16 bits.
            let [left, right] = if half { [left, right] } else { [left, right].map(|x| x.cast(DType::F32)) };
            return Term { x: left.mul(&right), labels: result };
        }
        let own: Vec<usize> = [&left.shape()[b..b + m], &right.shape()[b + k..]].concat();
        let shared = |x: &Tensor| Shape::new(&x.shape()[..b]);
        let batches = shape::broadcast("einsum", &shared(&left), &shared(&right));
        // A product has at most four axes of batches.
        let many = b > MAX_AXES - 2;
        let [left, right] = [left, right].map(|x| if many { one_batch(&x, &batches) } else { x });
        let b = if many { 1 } else { b };
        // The inner axes come first, because they are at least one, and become no more than that.
        let left = merged(&merged(&left, b + m, k), b, m);
        let right = merged(&merged(&right, b, k), b + 1, n);
        let y = left.matmul(&right).reshape(&[&batches[..], &own].concat()[..]);
        Term { x: y, labels: result }
    }
}

/// All batches, of which `all` are the sizes, as one axis.
fn one_batch(x: &Tensor, all: &Shape) -> Tensor {
    let rest = &x.shape()[all.len()..];
    let whole = x.expand(&[&all[..], rest].concat()[..]);
    whole.reshape(&[&[all.count()], rest].concat()[..])
}

/// `count` axes from `at` on as one: a view if the strides allow it, else a copy. Without axes, a new one of size 1.
fn merged(x: &Tensor, at: usize, count: usize) -> Tensor {
    if count == 0 {
        return x.unsqueeze(at as isize);
    }
    let from = *x.shape();
    let (group, rest) = (Shape::new(&from[at..at + count]), &from[at + count..]);
    let to = Shape::new(&[&from[..at], &[group.count()], rest].concat());
    let mut strides: Strides = [0; MAX_AXES];
    strides[..count].copy_from_slice(&x.strides[at..at + count]);
    let (sizes, steps) = shape::collapse(&group, &[strides]);
    if sizes.len() > 1 || count == 1 {
        return if count == 1 { x.clone() } else { x.reshape(to) };
    }
    let mut view = x.clone();
    view.shape = to;
    view.strides = [0; MAX_AXES];
    view.strides[..at].copy_from_slice(&x.strides[..at]);
    view.strides[at] = steps[0].first().copied().unwrap_or(0);
    view.strides[at + 1..at + 1 + rest.len()]
        .copy_from_slice(&x.strides[at + count..at + count + rest.len()]);
    x.viewed("reshape", view, move |dy| dy.reshape(from))
}

/// The elements whose places along axes `a < b` of one size are equal, along `a`. A view. The gradient of all others is 0.
fn diagonal(x: &Tensor, a: usize, b: usize) -> Tensor {
    let n = x.shape()[a];
    let mut view = x.clone();
    view.shape = x.shape().without(b);
    view.strides[a] += x.strides[b];
    view.strides.copy_within(b + 1.., b);
    let axes = x.shape().len();
    x.viewed("diagonal", view, move |dy| {
        let along = |axis: usize| {
            let mut sizes = vec![1; axes];
            sizes[axis] = n;
            Tensor::positions(dy.gpu(), n).reshape(&sizes[..])
        };
        dy.unsqueeze(b as isize).where_mask(&along(a).eq(&along(b)), 0.0)
    })
}

impl Tensor {
    /// The sum of products that an equation in Einstein's notation names, as in NumPy and PyTorch. Each operand has a letter
    /// for each axis. Letters of the result stay, and all products are summed over the others: `ij,jk->ik` is a matrix
    /// product.
    ///
    /// * Without `->`, the result has the letters that occur once, in alphabetical order.
    /// * `...` stands for any further axes, which broadcast and must be in the result.
    /// * A letter that is twice in one operand takes its diagonal.
    ///
    /// Operands are joined from left to right. What only one operand has is summed first. Each pair is then one batched
    /// [`Tensor::matmul`], which reads transposed views in place, or one elementwise product if nothing is summed. Products
    /// are f32, and 16 bits in a scope of [`autocast`](crate::autocast). The order of operands matters for the cost: put
    /// those first whose product is small.
    ///
    /// # Panics
    /// If the equation is not one, its letters do not fit the shapes, a letter has two sizes, a product on the way has more
    /// than six axes, operands are not floats, or they are on different devices. The message names the letter.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let a = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// let b = Tensor::from_slice(&gpu, &[1f32, 10.0], [2]);
    /// assert_eq!(Tensor::einsum("ij,j->i", &[&a, &b]).to_vec::<f32>()?, [21.0, 43.0]);
    /// assert_eq!(Tensor::einsum("ii", &[&a]).item()?, 5.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn einsum(equation: &str, operands: &[&Tensor]) -> Tensor {
        assert!(!operands.is_empty(), "einsum: no operands for {equation:?}");
        same_gpu("einsum", operands);
        for (i, x) in operands.iter().enumerate() {
            let dtype = x.dtype();
            assert!(
                dtype.is_float(),
                "einsum: operand {i} of {equation:?} is {dtype}, not float; cast it first"
            );
        }
        let shapes: Vec<Shape> = operands.iter().map(|x| *x.shape()).collect();
        let Equation { inputs, output } = Equation::of(equation, &shapes);
        let mut all = Term::of(operands[0], &inputs[0]);
        for (i, x) in operands.iter().enumerate().skip(1) {
            let later = |label: char| {
                output.contains(&label) || inputs[i + 1..].iter().any(|labels| labels.contains(&label))
            };
            let next = Term::of(x, &inputs[i]);
            let left = all.only(|label| next.has(label) || later(label));
            let right = next.only(|label| left.has(label) || later(label));
            all = left.times(&right, later);
        }
        all.only(|label| output.contains(&label)).ordered(&output)
    }

    /// Products of batches of matrices, `[batch, m, k] x [batch, k, n] -> [batch, m, n]`: [`Tensor::matmul`] for exactly three
    /// axes and equal batches, as PyTorch's `bmm`.
    ///
    /// # Panics
    /// If an operand does not have three axes, sizes do not fit, or a type is not a float.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let a = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 1, 2]);
    /// let y = a.bmm(&a.transpose(1, 2));
    /// assert_eq!(y.to_vec::<f32>()?, [5.0, 25.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn bmm(&self, rhs: &Tensor) -> Tensor {
        let (a, b) = (self.shape(), rhs.shape());
        let fits = a.len() == 3 && b.len() == 3 && a[0] == b[0];
        assert!(fits, "bmm: needs [batch, m, k] and [batch, k, n], got {a} and {b}; matmul broadcasts");
        self.matmul(rhs)
    }
}

/// The reference: for each value of every letter, in any order, one product of elements.
fn einsum64(inputs: &[&str], output: &str, x: &[Array]) -> Array {
    let mut letters: Vec<(char, usize)> = Vec::new();
    for (labels, x) in inputs.iter().zip(x) {
        for (label, &size) in labels.chars().zip(&x.shape[..]) {
            if !letters.iter().any(|(known, _)| *known == label) {
                letters.push((label, size));
            }
        }
    }
    let size = |label: char| letters.iter().find(|(known, _)| *known == label).expect("a letter").1;
    let sizes: Vec<usize> = output.chars().map(size).collect();
    let mut y = Array::from_fn(&sizes[..], |_| 0.0);
    for all in 0..letters.iter().map(|(_, size)| size).product() {
        let value = |label: char| {
            let at = letters.iter().position(|(known, _)| *known == label).expect("a letter");
            all / letters[at + 1..].iter().map(|(_, size)| size).product::<usize>() % letters[at].1
        };
        let flat = |labels: &str| labels.chars().fold(0, |flat, label| flat * size(label) + value(label));
        y.data[flat(output)] += inputs.iter().zip(x).map(|(labels, x)| x.data[flat(labels)]).product::<f64>();
    }
    y
}

pub(super) fn cases() -> Vec<Case> {
    // The equation, what it means in full, and the shapes.
    type Row = (&'static str, &'static str, &'static [&'static [usize]]);
    let rows: [Row; 25] = [
        ("ij,jk->ik", "ij,jk->ik", &[&[5, 7], &[7, 3]]),
        ("ij,jk", "ij,jk->ik", &[&[5, 7], &[7, 3]]),
        ("ba,ca", "ba,ca->bc", &[&[5, 7], &[3, 7]]),
        ("kj, ik -> ji", "kj,ik->ji", &[&[5, 4], &[3, 5]]),
        ("i,i->", "i,i->", &[&[7], &[7]]),
        ("i,j->ij", "i,j->ij", &[&[3], &[5]]),
        ("i,j->ji", "i,j->ji", &[&[3], &[5]]),
        ("ij,ij->ij", "ij,ij->ij", &[&[3, 5], &[3, 5]]),
        ("bhqd,bhkd->bhqk", "bhqd,bhkd->bhqk", &[&[2, 3, 4, 5], &[2, 3, 7, 5]]),
        ("bqhd,bkhd->bhqk", "bqhd,bkhd->bhqk", &[&[2, 4, 3, 8], &[2, 5, 3, 8]]),
        ("bhqk,bkhd->bqhd", "bhqk,bkhd->bqhd", &[&[2, 3, 4, 5], &[2, 5, 3, 4]]),
        // Two axes are summed, in one order and in two.
        ("bij,ijk->bk", "bij,ijk->bk", &[&[2, 3, 4], &[3, 4, 5]]),
        ("jbi,ijk->kb", "jbi,ijk->kb", &[&[3, 2, 4], &[4, 3, 5]]),
        ("ijb,ijk->bk", "ijb,ijk->bk", &[&[3, 4, 2], &[3, 4, 5]]),
        // What only one operand has is summed first.
        ("ij,kl->i", "ij,kl->i", &[&[3, 5], &[2, 7]]),
        ("ij->j", "ij->j", &[&[3, 5]]),
        ("ijk->", "ijk->", &[&[3, 5, 2]]),
        ("ijk->kij", "ijk->kij", &[&[3, 5, 2]]),
        // Diagonals.
        ("ii", "ii->", &[&[5, 5]]),
        ("iji->ij", "iji->ij", &[&[4, 3, 4]]),
        ("iii,j->ij", "iii,j->ij", &[&[3, 3, 3], &[2]]),
        // Three and more operands.
        ("ij,jk,kl->il", "ij,jk,kl->il", &[&[2, 3], &[3, 5], &[5, 4]]),
        ("a,b,ab,bc->c", "a,b,ab,bc->c", &[&[3], &[4], &[3, 4], &[4, 2]]),
        ("abcdef,abcdef->abcde", "abcdef,abcdef->abcde", &[&[2, 1, 2, 1, 2, 3], &[2, 1, 2, 1, 2, 3]]),
        // Other axes.
        ("...ij,...jk->...ik", "abij,abjk->abik", &[&[2, 3, 4, 5], &[2, 3, 5, 2]]),
    ];
    let mut all: Vec<Case> = rows
        .into_iter()
        .map(|(equation, meaning, shapes)| {
            let inputs = shapes.iter().map(|shape| Input::normal(*shape)).collect();
            let (left, output) = meaning.split_once("->").expect("an arrow");
            let left: Vec<&str> = left.split(',').collect();
            let call = move |x: &[Tensor]| Tensor::einsum(equation, &x.iter().collect::<Vec<_>>());
            Case::new(equation, inputs, call, move |x| einsum64(&left, output, x)).ulps(8.0, 16.0)
        })
        .collect();
    // Axes under dots broadcast: those of one operand are of size 1 or not there.
    all.push(Case::new(
        "i...k,...k->...i broadcast",
        vec![Input::normal([3, 1, 2, 5]), Input::normal([4, 1, 5])],
        |x| {
            Tensor::einsum("i...k,...k", &[&x[0], &x[1]])
                .add(&Tensor::einsum("i...k,...k->...i", &[&x[0], &x[1]]))
        },
        |x| {
            Array::from_fn([4, 2, 3], |at| {
                let (a, b, i) = (at / 6, at / 3 % 2, at % 3);
                (0..5).map(|k| 2.0 * x[0].data[(i * 2 + b) * 5 + k] * x[1].data[a * 5 + k]).sum()
            })
        },
    ));
    all.push(Case::new(
        "bmm",
        vec![Input::normal([3, 5, 6]), Input::normal([3, 6, 4])],
        |x| x[0].bmm(&x[1]),
        |x| einsum64(&["bij", "bjk"], "bik", x),
    ));
    for dtype in [DType::F16, DType::Bf16] {
        let input = |shape: [usize; 3]| Input::normal(shape).dtype(dtype).fixed();
        let inputs = vec![input([2, 5, 8]), input([2, 7, 8])];
        all.push(Case::new(
            format!("{dtype}"),
            inputs,
            |x| Tensor::einsum("bid,bjd->bij", &[&x[0], &x[1]]),
            |x| einsum64(&["bid", "bjd"], "bij", x),
        ));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(equation: &str, shapes: &[&[usize]]) -> String {
        let shapes: Vec<Shape> = shapes.iter().map(|shape| Shape::new(shape)).collect();
        Equation::of(equation, &shapes).output.into_iter().collect()
    }

    #[test]
    fn the_result_of_an_equation_without_one_is_sorted() {
        assert_eq!(output("ba,ca", &[&[1, 2], &[3, 2]]), "bc");
        assert_eq!(output("ii", &[&[2, 2]]), "");
        assert_eq!(output("z...A", &[&[2, 5, 6, 2]]), "10Az");
    }

    #[test]
    #[should_panic(expected = "einsum: `j` is 3 in operand 0 and 4 in operand 1 of \"ij,jk\"")]
    fn names_the_letter_and_both_sizes() {
        output("ij,jk", &[&[2, 3], &[4, 5]]);
    }

    #[test]
    #[should_panic(expected = "einsum: an axis under ... is 2 in operand 0 and 3 in operand 1")]
    fn axes_under_dots_must_broadcast() {
        output("...i,...i", &[&[2, 3], &[3, 3]]);
    }

    #[test]
    #[should_panic(expected = "einsum: `ijk` names 3 axes, but operand 1 of \"ij,ijk->i\" has 2: [3, 5]")]
    fn counts_letters() {
        output("ij,ijk->i", &[&[2, 3], &[3, 5]]);
    }

    #[test]
    #[should_panic(expected = "einsum: `z` in the result of \"ij->iz\" is in no operand")]
    fn the_result_has_letters_of_operands() {
        output("ij->iz", &[&[2, 3]]);
    }

    #[test]
    #[should_panic(expected = "einsum: `i` is twice in the result of \"ij->ii\"")]
    fn the_result_has_each_letter_once() {
        output("ij->ii", &[&[2, 3]]);
    }

    #[test]
    #[should_panic(expected = "einsum: `...` of the operands of \"...i->i\" is not in the result")]
    fn the_result_has_the_dots() {
        output("...i->i", &[&[2, 3]]);
    }

    #[test]
    #[should_panic(expected = "einsum: \"ij,jk\" has 2 operands, but 1 are given")]
    fn counts_operands() {
        output("ij,jk", &[&[2, 3]]);
    }

    #[test]
    #[should_panic(expected = "einsum: '1' in \"i1->i\"; operands are letters")]
    fn operands_are_letters() {
        output("i1->i", &[&[2, 3]]);
    }
}
