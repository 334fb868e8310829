//! The neighbours of points: those within a radius, or the nearest, with periodic images.

use super::graph::{Graph, batch_of, checked};
use super::vectors::{DMat3, DVec3, Mat3, Vec3};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ops::points::neighbours::{Cells, Found};

/// A periodic cell: three lattice vectors, and flags that say along which of them space repeats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell {
    /// The lattice vectors, as rows. Those along which space does not repeat may be zero.
    pub vectors: Mat3,
    /// The vectors along which space repeats.
    pub periodic: [bool; 3],
}

impl Cell {
    /// Makes a box with these sides, periodic along all three.
    pub fn cuboid(sides: [f64; 3]) -> Cell {
        let [x, y, z] = sides;
        Cell { vectors: [[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, z]], periodic: [true; 3] }
    }

    /// Returns this cell with every vector multiplied by `m`.
    pub fn turned(self, m: &DMat3) -> Cell {
        Cell { vectors: self.vectors.map(|v| (m * DVec3::from(v)).into()), ..self }
    }
}

/// Point clouds one after the other, each in its own cell or in free space.
#[derive(Clone, Copy, Debug)]
pub struct Clouds<'a> {
    /// `[nodes, dimension]` row-major.
    pub positions: &'a [f32],
    /// 2 or 3.
    pub dimension: usize,
    /// Number of nodes of each graph.
    pub sizes: &'a [usize],
    /// One cell per graph, or none at all.
    pub cells: &'a [Option<Cell>],
}

/// The most cells that the search may look at from one point.
const MOST_VISITS: f64 = 1e6;
/// The farthest image along one vector: images are packed in 10 bits.
const MOST_IMAGES: f64 = 500.0;

/// The axes of one graph: three independent vectors, their inverse, and which of them are periodic.
struct Frame {
    /// Columns are the vectors: `x = vectors fraction`.
    vectors: DMat3,
    /// `fraction = inverse x`
    inverse: DMat3,
    periodic: [bool; 3],
}

impl Frame {
    fn new(cell: Option<Cell>) -> Result<Frame> {
        let cell = cell.unwrap_or(Cell { vectors: [[0.0; 3]; 3], periodic: [false; 3] });
        let (mut v, periodic) = (cell.vectors.map(DVec3::from), cell.periodic);
        if v.iter().any(|v| !v.is_finite()) {
            return Err(Error::config(format!("neighbours: the cell {:?} is not finite", cell.vectors)));
        }
        // An axis that is not periodic may have any direction that the others leave free: it becomes a unit vector at
        // right angles to them.
        for i in (0..3).filter(|&i| !periodic[i]) {
            let (a, b) = (v[(i + 1) % 3], v[(i + 2) % 3]);
            let known: Vec<DVec3> = [(i + 1) % 3, (i + 2) % 3]
                .into_iter()
                .filter(|&j| periodic[j] || j < i)
                .map(|j| v[j])
                .collect();
            let free = match known[..] {
                [_, _] => a.cross(b),
                [one] => one.any_orthogonal_vector(),
                _ => DVec3::X,
            };
            v[i] = if free.length() > 0.0 { free / free.length() } else { free };
        }
        let vectors = DMat3::from_cols_array_2d(&v.map(Vec3::from));
        let volume = vectors.determinant();
        let lengths = v.map(DVec3::length);
        // The bound is relative to a box with the same sides, so it does not depend on the unit of length.
        if volume.abs() <= 1e-9 * lengths.iter().product::<f64>() || volume == 0.0 {
            return Err(Error::config(format!(
                "neighbours: the cell {:?} has no volume; give periodic axes vectors that are not in one plane",
                cell.vectors
            )));
        }
        // This divides by the volume, where glam's inverse multiplies by the reciprocal. So each number is rounded once, which
        // keeps points on a face of the cell exactly there.
        let [a, b, c] = [0, 1, 2].map(|i| v[(i + 1) % 3].cross(v[(i + 2) % 3]) / volume);
        Ok(Frame { vectors, inverse: DMat3::from_cols(a, b, c).transpose(), periodic })
    }

    /// Returns the number of periods by which a point with these fractions must be moved down to be in the cell.
    fn down(&self, fractions: DVec3) -> DVec3 {
        DVec3::select(self.periodic.into(), fractions.floor(), DVec3::ZERO)
    }
}

impl Cell {
    /// Moves positions by whole periods into the cell, where their fractions along the periodic axes are from 0 to 1.
    ///
    /// # Errors
    /// When the cell has no volume, or a position is not finite or more than 1e9 periods away.
    pub(in crate::geometry) fn wrapped(self, positions: &[Vec3]) -> Result<Vec<Vec3>> {
        if !positions.iter().flatten().all(|x| x.is_finite()) {
            return Err(Error::config("neighbours: a position is not finite"));
        }
        let frame = Frame::new(Some(self))?;
        let one = |x: &Vec3| {
            let x = DVec3::from(*x);
            let down = frame.down(frame.inverse * x);
            match down.abs().max_element() > FARTHEST {
                true => Err(far()),
                false => Ok((x - frame.vectors * down).into()),
            }
        };
        positions.iter().map(one).collect()
    }
}

/// The most periods by which a position is moved. Farther out its place in the cell is lost to rounding.
const FARTHEST: f64 = 1e9;

fn far() -> Error {
    Error::config("neighbours: a position is more than 1e9 periods away; wrap it into the cell")
}

/// The frames and points of all graphs in f64, before the points are sorted into cells for some radius.
struct Prepared {
    frames: Vec<Frame>,
    batch: Vec<u32>,
    sizes: Vec<usize>,
    positions: Vec<DVec3>,
    /// The points in units of the frame's vectors, moved into the cell along periodic axes.
    fractions: Vec<DVec3>,
    /// The number of periods by which each point was moved.
    moves: Vec<[i64; 3]>,
}

impl Prepared {
    fn new(of: &Clouds) -> Result<Prepared> {
        let nodes = checked(of.positions, of.dimension)?;
        let batch = batch_of(nodes, of.sizes)?;
        if !of.cells.is_empty() && of.cells.len() != of.sizes.len() {
            let (cells, graphs) = (of.cells.len(), of.sizes.len());
            return Err(Error::config(format!(
                "neighbours: {cells} cells for {graphs} graphs; give one each, or none"
            )));
        }
        let frames: Vec<Frame> = (0..of.sizes.len())
            .map(|g| Frame::new(of.cells.get(g).copied().flatten()))
            .collect::<Result<_>>()?;
        let leaves_plane =
            |frame: &Frame| (0..3).any(|i| frame.periodic[i] && (i == 2 || frame.vectors.col(i).z != 0.0));
        if of.dimension == 2 && frames.iter().any(leaves_plane) {
            return Err(Error::config(
                "neighbours: points of the plane in a cell that is periodic out of it; make the third vector not periodic",
            ));
        }
        let points = of.positions.chunks(of.dimension);
        let positions: Vec<DVec3> = points
            .map(|p| DVec3::new(p[0] as f64, p[1] as f64, p.get(2).map_or(0.0, |&z| z as f64)))
            .collect();
        let (mut fractions, mut moves) = (Vec::with_capacity(nodes), Vec::with_capacity(nodes));
        for (x, &g) in positions.iter().zip(&batch) {
            let frame = &frames[g as usize];
            let s = frame.inverse * x;
            let down = frame.down(s);
            if down.abs().max_element() > FARTHEST {
                return Err(far());
            }
            fractions.push(s - down);
            moves.push(down.as_i64vec3().to_array());
        }
        Ok(Prepared { frames, batch, sizes: of.sizes.to_vec(), positions, fractions, moves })
    }

    /// Sorts the points into cells for this radius. Along each axis, cells are at least as wide as the radius, or there
    /// is only one. Graphs for which `asked` is false get a reach of 0.
    fn cells(&self, radius: f64, asked: impl Fn(usize) -> bool) -> Result<Cells> {
        let mut all = Cells { starts: vec![0], ..Cells::default() };
        let mut first = 0;
        for (g, (frame, &size)) in self.frames.iter().zip(&self.sizes).enumerate() {
            let own = first..first + size;
            let fractions = &self.fractions[own.clone()];
            // Axes that are not periodic extend from the lowest point to the highest.
            let bounds: [[f64; 2]; 3] = std::array::from_fn(|i| match frame.periodic[i] {
                true => [0.0, 1.0],
                false => extent(fractions, i),
            });
            let low = bounds.map(|b| b[0]);
            let span = bounds.map(|b| b[1] - b[0]);
            // The distances between opposite faces.
            let height: Vec3 = std::array::from_fn(|i| span[i] / frame.inverse.row(i).length());
            let most = (4.0 * size as f64 + 64.0).cbrt().ceil();
            let counts = height.map(|h| (h / radius).floor().clamp(1.0, most));
            let reach: Vec3 = std::array::from_fn(|i| match frame.periodic[i] {
                true => (radius * counts[i] / height[i]).ceil(),
                // An axis without periods has nothing beyond its last cell.
                false => (radius * counts[i] / height[i].max(f64::MIN_POSITIVE)).ceil().min(counts[i]),
            });
            let visits: f64 = reach.iter().map(|r| 2.0 * r + 1.0).product();
            let images = (0..3).map(|i| reach[i] / counts[i]).fold(0.0, f64::max);
            if asked(g) && (visits > MOST_VISITS || images > MOST_IMAGES) {
                return Err(Error::config(format!(
                    "neighbours: a radius of {radius} reaches over {images:.0} images of a cell {height:?} high; use a smaller \
                     radius or a larger cell"
                )));
            }
            let n = counts.map(|c| c as usize);
            let place = |s: &DVec3| -> [usize; 3] {
                std::array::from_fn(|i| {
                    let at = (s[i] - low[i]) / span[i].max(f64::MIN_POSITIVE) * counts[i];
                    (at.max(0.0) as usize).min(n[i] - 1)
                })
            };
            let periodic = (0..3).map(|i| (frame.periodic[i] as u32) << i).sum::<u32>();
            let first_cell = all.starts.len() - 1;
            all.grids.extend(n.map(|n| n as u32).into_iter().chain([first_cell as u32]));
            // The reach of a graph without queries must not add launches.
            let reach = if asked(g) { reach } else { [0.0; 3] };
            all.grids.extend(reach.map(|r| r as u32).into_iter().chain([periodic]));
            let graph = all.lattice.len() as u32 / 12;
            for v in frame.vectors.to_cols_array_2d() {
                all.lattice.extend(v.map(|x| x as f32).into_iter().chain([0.0]));
            }
            // Positions are relative to the lowest corner, so that f32 keeps its digits wherever the cloud is.
            let corner = frame.vectors * DVec3::from(low);
            let mut lists = vec![Vec::new(); n.iter().product()];
            for (i, s) in own.zip(fractions) {
                let (c, x) = (place(s), frame.vectors * s - corner);
                all.points.extend((0..3).map(|k| x[k] as f32).chain([0.0]));
                all.places.extend(c.map(|c| c as u32).into_iter().chain([graph]));
                lists[(c[2] * n[1] + c[1]) * n[0] + c[0]].push(i as u32);
            }
            for list in lists {
                all.members.extend(&list);
                all.starts.push(all.members.len() as u32);
            }
            first += size;
        }
        Ok(all)
    }

    /// Converts an image between the moved points into the one between the points as they were given.
    fn image(&self, own: usize, other: usize, image: [i32; 3]) -> [i64; 3] {
        std::array::from_fn(|i| image[i] as i64 - self.moves[other][i] + self.moves[own][i])
    }

    fn shift(&self, own: usize, image: [i64; 3]) -> DVec3 {
        self.frames[self.batch[own] as usize].vectors * DVec3::from(image.map(|n| n as f64))
    }
}

/// Returns the lowest and the highest coordinate of the points along one axis.
fn extent(points: &[DVec3], axis: usize) -> [f64; 2] {
    let Some(first) = points.first() else { return [0.0; 2] };
    points.iter().fold([first[axis]; 2], |b, s| [b[0].min(s[axis]), b[1].max(s[axis])])
}

/// The edges into each point, collected before they become a graph.
#[derive(Default)]
struct List {
    sources: Vec<u32>,
    destinations: Vec<u32>,
    shifts: Vec<f32>,
}

impl List {
    fn push(&mut self, of: &Prepared, own: usize, other: u32, image: [i64; 3], dimension: usize) {
        self.sources.push(other);
        self.destinations.push(own as u32);
        self.shifts.extend(of.shift(own, image).to_array()[..dimension].iter().map(|&x| x as f32));
    }

    fn graph(self, gpu: &Gpu, of: &Clouds, prepared: &Prepared) -> Result<Graph> {
        let graph =
            Graph::new(gpu, of.positions, of.dimension, &self.sources, &self.destinations, &prepared.batch)?;
        let periodic = prepared.frames.iter().any(|frame| frame.periodic.contains(&true));
        if periodic { graph.with_shifts(&self.shifts) } else { Ok(graph) }
    }
}

/// Returns the neighbours of one query, in an order that does not depend on the search.
fn row(of: &Prepared, found: &Found, at: usize, own: usize) -> Vec<(u32, [i64; 3])> {
    let range = found.starts[at]..found.starts[at + 1];
    let image = |i: usize| of.image(own, found.points[i] as usize, found.images[i]);
    let mut row: Vec<_> = range.map(|i| (found.points[i], image(i))).collect();
    row.sort_unstable();
    row
}

impl Graph {
    /// Makes an edge into every point from every point, or periodic image of one, that is nearer than `radius`. Images of
    /// the point itself count, and the point itself does if `self_loops`. If the radius exceeds a period, several images
    /// of a point may be neighbours.
    ///
    /// The host sorts the points into cells and the device looks for neighbours, in time linear in the number of points.
    ///
    /// # Errors
    /// When a position is not finite, a cell has no volume, sizes or cells do not fit the positions, the radius is not
    /// above 0 or reaches over too many images, or the edges exceed the device's memory.
    pub fn radius(gpu: &Gpu, of: &Clouds, radius: f32, self_loops: bool) -> Result<Graph> {
        if !(radius.is_finite() && radius > 0.0) {
            return Err(Error::config(format!("neighbours: the radius is {radius}; it must be above 0")));
        }
        let prepared = Prepared::new(of)?;
        let queries: Vec<u32> = (0..prepared.positions.len() as u32).collect();
        let found = prepared.cells(radius as f64, |_| true)?.search(gpu, &queries, radius)?;
        let mut list = List::default();
        for own in 0..prepared.positions.len() {
            if self_loops {
                list.push(&prepared, own, own as u32, [0; 3], of.dimension);
            }
            for (other, image) in row(&prepared, &found, own, own) {
                list.push(&prepared, own, other, image, of.dimension);
            }
        }
        list.graph(gpu, of, &prepared)
    }

    /// Makes an edge into every point from the `k` nearest other points of its graph, or from all if there are fewer, and
    /// from the point itself if `self_loops`. Periodic images count as points. At equal distance, the point of lower
    /// number is taken.
    ///
    /// # Errors
    /// As [`Graph::radius`].
    pub fn nearest(gpu: &Gpu, of: &Clouds, k: usize, self_loops: bool) -> Result<Graph> {
        let prepared = Prepared::new(of)?;
        let mut chosen: Vec<Vec<(u32, [i64; 3])>> = vec![Vec::new(); prepared.positions.len()];
        let mut radius = prepared.guess(k);
        let mut queries: Vec<u32> = if k == 0 { vec![] } else { (0..chosen.len() as u32).collect() };
        // If a point's sphere holds k others, the nearest are among them. The other points search again with a larger
        // radius.
        while !queries.is_empty() {
            if !(radius as f32 * radius as f32).is_finite() {
                return Err(Error::config(
                    "neighbours: points are too far from each other to square their distance in f32; scale the positions",
                ));
            }
            let mut asked = vec![false; prepared.sizes.len()];
            queries.iter().for_each(|&q| asked[prepared.batch[q as usize] as usize] = true);
            let found = prepared.cells(radius, |g| asked[g])?.search(gpu, &queries, radius as f32)?;
            let mut rest = Vec::new();
            for (at, &query) in queries.iter().enumerate() {
                let own = query as usize;
                let row = row(&prepared, &found, at, own);
                let graph = prepared.batch[own] as usize;
                let free = !prepared.frames[graph].periodic.contains(&true);
                if row.len() < k && !(free && row.len() + 1 >= prepared.sizes[graph]) {
                    rest.push(query);
                    continue;
                }
                let far = |&(other, image): &(u32, [i64; 3])| {
                    let (x, y, s) = (
                        prepared.positions[other as usize],
                        prepared.positions[own],
                        prepared.shift(own, image),
                    );
                    (x - y + s).length_squared()
                };
                let mut row: Vec<_> = row.into_iter().map(|edge| (far(&edge), edge)).collect();
                row.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
                row.truncate(k);
                chosen[own] = row.into_iter().map(|(_, edge)| edge).collect();
            }
            queries = rest;
            radius *= 1.7;
        }
        let mut list = List::default();
        for (own, mut row) in chosen.into_iter().enumerate() {
            if self_loops {
                row.push((own as u32, [0; 3]));
            }
            row.sort_unstable();
            row.into_iter().for_each(|(other, image)| list.push(&prepared, own, other, image, of.dimension));
        }
        list.graph(gpu, of, &prepared)
    }
}

impl Prepared {
    /// Returns a radius whose sphere would hold about `k` points of the densest graph if its points were spread evenly.
    fn guess(&self, k: usize) -> f64 {
        let mut first = 0;
        let mut least = f64::INFINITY;
        for (frame, &size) in self.frames.iter().zip(&self.sizes) {
            let own = &self.fractions[first..first + size];
            first += size;
            let side = |i: usize| {
                let [low, high] = if frame.periodic[i] { [0.0, 1.0] } else { extent(own, i) };
                (high - low) / frame.inverse.row(i).length()
            };
            let sides = [0, 1, 2].map(side);
            let longest = sides.iter().copied().fold(0.0, f64::max);
            // A flat cloud has no volume, so each side counts as at least a tenth of the longest.
            let volume: f64 = sides.iter().map(|s| s.max(0.1 * longest)).product();
            if size > 1 && volume > 0.0 {
                least = least.min((volume * (k + 1) as f64 / size as f64).cbrt());
            } else if frame.periodic.contains(&true) && size > 0 {
                least = least.min((volume * (k + 1) as f64).cbrt());
            }
        }
        if least.is_finite() && least > 0.0 { least } else { 1.0 }
    }
}
