//! The merges of the zoo, each as a configuration that `tiebeam merge` reads.

use serde_json::{Value, json};

/// A row of the table.
pub struct Method {
    /// Its name in the table.
    pub name: &'static str,
    /// The configuration without models.
    config: Value,
    /// Values of a number that is chosen on the validation sets, and where it stands.
    pub grid: Option<(Place, &'static [f64])>,
    /// Whether models name their Fisher diagonals.
    fisher: bool,
}

/// Where a number stands that is chosen.
#[derive(Clone, Copy)]
pub enum Place {
    /// The weight of every model.
    Weight,
    /// `lambda` of all.
    Lambda,
}

const SCALES: &[f64] = &[0.2, 0.3, 0.4, 0.6, 0.8, 1.0];

impl Method {
    fn new(name: &'static str, config: Value, grid: Option<(Place, &'static [f64])>) -> Method {
        Method { name, config, grid, fisher: name.starts_with("fisher") }
    }

    /// The configuration with models, the value of the grid, and the tasks that it learns on.
    pub fn config(&self, models: &[String], learn: &Value, value: Option<f64>) -> Value {
        let mut config = self.config.clone();
        let one = |name: &String| {
            let mut model = json!({"model": format!("{name}.safetensors")});
            if let (Some((Place::Weight, _)), Some(value)) = (self.grid, value) {
                model["parameters"]["weight"] = json!(value);
            }
            if self.fisher {
                model["parameters"]["weight"] = json!(1.0);
                model["parameters"]["fisher"] = json!(format!("fisher-{name}.safetensors"));
            }
            model
        };
        config["models"] = models.iter().map(one).collect();
        if let (Some((Place::Lambda, _)), Some(value)) = (self.grid, value) {
            config["parameters"]["lambda"] = json!(value);
        }
        let method = config["merge_method"].as_str().unwrap_or("").to_string();
        if !["average", "fisher"].contains(&&*method) {
            config["base_model"] = json!("base.safetensors");
        }
        if config.get("search").is_some() || ["atlas", "map"].contains(&&*method) {
            config["learn"] = learn.clone();
        }
        config
    }
}

/// All rows, in the order of the table.
pub fn all() -> Vec<Method> {
    let density = json!({"weight": 1.0, "density": 0.2, "normalize": true});
    let scales = |place| Some((place, SCALES));
    vec![
        Method::new("average", json!({"merge_method": "average"}), None),
        Method::new("task arithmetic", json!({"merge_method": "task_arithmetic"}), scales(Place::Weight)),
        Method::new(
            "TIES",
            json!({"merge_method": "ties", "parameters": density}),
            Some((Place::Lambda, &[0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0])),
        ),
        Method::new(
            "breadcrumbs, by rows",
            json!({"merge_method": "breadcrumbs", "parameters": {"density": 0.85, "gamma": 0.01, "mask": "last_axis"}}),
            scales(Place::Weight),
        ),
        Method::new(
            "DARE",
            json!({"merge_method": "dare_linear", "parameters": {"density": 0.5}}),
            scales(Place::Weight),
        ),
        Method::new("model stock", json!({"merge_method": "model_stock"}), None),
        Method::new("fisher", json!({"merge_method": "fisher", "parameters": {"normalize": true}}), None),
        Method::new(
            "PCB",
            json!({"merge_method": "pcb", "parameters": {"ratio": 0.1}}),
            Some((Place::Lambda, &[0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0])),
        ),
        Method::new(
            "PCB, searched scales",
            json!({
                "merge_method": "pcb", "parameters": {"ratio": 0.1},
                "search": {"low": 0.0, "high": 3.0, "start": 1.2, "evaluations": 100},
            }),
            None,
        ),
        Method::new(
            "task arithmetic, searched",
            json!({
                "merge_method": "task_arithmetic",
                "search": {"low": 0.0, "high": 1.0, "start": 0.4, "evaluations": 100},
            }),
            None,
        ),
        Method::new(
            "MAP, equal preference",
            json!({"merge_method": "map", "parameters": {"samples": 60, "high": 1.0}}),
            None,
        ),
        Method::new(
            "aTLAS, with labels",
            json!({"merge_method": "atlas", "parameters": {"steps": 200, "batch": 64}}),
            None,
        ),
        Method::new(
            "aTLAS, 10 shots",
            json!({"merge_method": "atlas", "parameters": {"steps": 200, "batch": 64, "shots": 10}}),
            None,
        ),
        Method::new(
            "aTLAS, no labels",
            json!({
                "merge_method": "atlas",
                "parameters": {"steps": 100, "rate": 0.01, "batch": 64, "objective": "information"},
            }),
            None,
        ),
    ]
}
