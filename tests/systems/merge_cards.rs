//! What stands around the weights of a merge, and forms of methods that others have: cards, names, signatures, masks by rows.

use crate::merges::{Folder, expect, save_model, three, values};
use crate::support::{download, gpu, within};
use std::collections::BTreeMap;
use tiebeam::merge::methods::{breadcrumbs_rows, signature};
use tiebeam::merge::{Job, MergeConfig};
use tiebeam::store::{Entry, FileDType, save};
use tiebeam::{Rng, Tensor};

#[test]
fn outputs_have_a_card_unless_there_is_one() {
    let folder = Folder::new("cards");
    three(&folder);
    let text = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 3}}\n";
    folder.write("a/README.md", "---\nlicense: apache-2.0\n---\n# A");
    folder.write("b/README.md", "---\nlicense: apache-2.0\n---\n# B");
    let card = |folder: &Folder| String::from_utf8(folder.contents("out")["README.md"].clone()).unwrap();
    folder.merge(text).unwrap();
    let written = card(&folder);
    for part in [
        "base_model:\n- a\n- b\n",
        "license: apache-2.0\n---",
        "by `linear`",
        "| a | apache-2.0 |",
        "```yaml\nmerge_method: linear\n",
    ] {
        assert!(written.contains(part), "{part}: {written}");
    }
    // With another licence, or none, there is none for the whole.
    folder.write("b/README.md", "# B");
    folder.merge(text).unwrap();
    let written = card(&folder);
    assert!(
        !written.contains("license: apache") && written.contains("| b | not named in its card |"),
        "{written}"
    );
    // A card of the user's stays.
    folder.write("out/README.md", "mine");
    folder.merge(text).unwrap();
    assert_eq!(card(&folder), "mine");
}

#[test]
fn names_are_mapped_by_a_table() {
    let folder = Folder::new("names");
    let [a, b, _] = three(&folder);
    // The same model under GPT-2's prefix.
    let other: BTreeMap<String, _> = b
        .iter()
        .map(|(name, x)| {
            (name.replace("model.layers.", "transformer.h.").replace(".norm.", ".ln."), x.clone())
        })
        .collect();
    save_model(&folder.0.join("other"), &other, FileDType::F32);
    let text = |table: &str| {
        format!("merge_method: average\nmodels:\n- {{model: a}}\n- {{model: other, names: {table}}}\n")
    };
    let good = text("{transformer.h.: model.layers., .ln.: .norm.}");
    expect(&folder.merge(&good).unwrap(), &[&a, &b], |_, x| (x[0] + x[1]) / 2.0);
    // A diagonal has the names of its model's file.
    for (name, model) in [("fisher-a", &a), ("fisher-other", &other)] {
        let ones = |(name, (shape, x)): (&String, &(Vec<usize>, Vec<f32>))| {
            (name.clone(), (shape.clone(), vec![1.0; x.len()]))
        };
        save_model(&folder.0.join(name), &model.iter().map(ones).collect(), FileDType::F32);
    }
    let fisher = good
        .replace("average", "fisher")
        .replace("model: a}", "model: a, parameters: {fisher: fisher-a, weight: 1}}")
        .replace("model: other,", "model: other, parameters: {fisher: fisher-other, weight: 1},");
    expect(&folder.merge(&fisher).unwrap(), &[&a, &b], |_, x| (x[0] + x[1]) / 2.0);
    for (table, words) in [
        ("{transformer.x.: model.}", "no tensor's name has `transformer.x.` in it"),
        ("{transformer.h.0.: transformer.h.1.}", "two tensors would have the name"),
        ("{transformer.h.: 3}", "`transformer.h.` must become text"),
        ("[a]", "must be a map of keys"),
    ] {
        let message = folder.refusal(&text(table));
        assert!(message.contains(words), "{message}");
    }
}

/// By hand in f64: the robust change without its part along the clean one; norms are the robust models' mean.
#[test]
fn signatures_are_the_authors() {
    let folder = Folder::new("signatures");
    let mut rng = Rng::new(5);
    let names: [(&str, &[usize]); 4] =
        [("conv.weight", &[4, 3]), ("bn.weight", &[4]), ("bn.running_mean", &[4]), ("fc.bias", &[5])];
    let mut all: BTreeMap<&str, BTreeMap<&str, Vec<f32>>> = BTreeMap::new();
    for model in ["pre", "clean", "r1", "r2", "target"] {
        for (name, shape) in names {
            let mut x = vec![0.0; shape.iter().product()];
            rng.fill_normal(&mut x);
            all.entry(model).or_default().insert(name, x);
        }
        let entries = names.iter().map(|(name, shape)| Entry::f32(*name, shape, &all[model][name]));
        save(folder.0.join(format!("{model}.safetensors")), entries, &BTreeMap::new()).unwrap();
    }
    let text = "merge_method: signature\nbase_model: target.safetensors\nparameters: {clean: clean.safetensors, pre: pre.safetensors}\n\
         models:\n- {model: r1.safetensors, parameters: {weight: 0.5}}\n- {model: r2.safetensors, parameters: {weight: 2}}\n";
    let merged = folder.merge(text).unwrap();
    let wide = |model: &str, name: &str| all[model][name].iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let minus = |a: Vec<f64>, b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<f64>>();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for name in ["conv.weight", "fc.bias"] {
        let pre = wide("pre", name);
        let clean = minus(wide("clean", name), &pre);
        let mut want = wide("target", name);
        for (robust, weight) in [("r1", 0.5), ("r2", 2.0)] {
            let change = minus(wide(robust, name), &pre);
            let along = dot(&change, &clean) / dot(&clean, &clean);
            want.iter_mut().zip(&change).zip(&clean).for_each(|((w, r), c)| *w += weight * (r - along * c));
        }
        let got: Vec<f64> = values(&merged, name).into_iter().map(f64::from).collect();
        within(name, &got, &want, |_| 1e-5);
        // The function by itself, and in parts.
        let x = |model: &str| Tensor::from_slice(gpu(), &all[model][name], [all[model][name].len()]);
        let robust = [x("r1"), x("r2")];
        let own = signature(&x("target"), &x("clean"), &robust, Some(&x("pre")), &[0.5, 2.0]).unwrap();
        within(name, &download(&own), &want, |_| 1e-5);
    }
    for name in ["bn.weight", "bn.running_mean"] {
        let want: Vec<f64> =
            wide("r1", name).iter().zip(wide("r2", name)).map(|(a, b)| (a + b) / 2.0).collect();
        let got: Vec<f64> = values(&merged, name).into_iter().map(f64::from).collect();
        within(name, &got, &want, |_| 1e-6);
    }
    let parts = folder.merge_in_parts("parts", text, 5 << 30, 3).unwrap();
    for (name, _) in names {
        let [a, b] =
            [&merged, &parts].map(|m| values(m, name).into_iter().map(f64::from).collect::<Vec<f64>>());
        within(name, &a, &b, |_| 1e-6);
    }
    // Its models are not moved: what they are compared with would stay.
    let aligned = format!("{text}align: {{spec: mlp}}\n");
    let job = Job::open(MergeConfig::from_yaml(&aligned, &folder.0).unwrap()).unwrap();
    let align = job.config.align.clone().unwrap();
    let message = job.align(gpu(), &align, &mut |_, _| Ok(())).expect_err("refused").to_string();
    assert!(message.contains("a signature's models are compared"), "{message}");
    // Without the two, the base is the clean model, and the pretrained one is 0.
    let plain =
        "merge_method: signature\nbase_model: target.safetensors\nmodels: [{model: r1.safetensors}]\n";
    let merged = folder.merge(plain).unwrap();
    let (r, c) = (wide("r1", "conv.weight"), wide("target", "conv.weight"));
    let along = dot(&r, &c) / dot(&c, &c);
    let want: Vec<f64> = r.iter().zip(&c).map(|(r, c)| c + r - along * c).collect();
    let got: Vec<f64> = values(&merged, "conv.weight").into_iter().map(f64::from).collect();
    within("pre = 0", &got, &want, |_| 1e-5);
}

/// The authors' two masks, one after the other, row by row.
#[test]
fn breadcrumbs_by_rows_are_the_authors() {
    let mut rng = Rng::new(6);
    for (rows, row, density, gamma) in [
        (7, 20, 0.5, 0.1),
        (1, 33, 0.9, 0.25),
        (5, 4, 0.3, 0.0),
        (3, 10, 1.0, 0.2),
        (4, 6, 0.0, 0.5),
        (2, 5, 0.7, 1.0),
    ] {
        let x = Tensor::randn(gpu(), [rows, row], &mut rng).contiguous();
        let values = download(&x);
        let mut want = vec![0.0; rows * row];
        for (r, own) in values.chunks(row).enumerate() {
            let mut order: Vec<usize> = (0..row).collect();
            order.sort_by(|&i, &j| own[j].abs().total_cmp(&own[i].abs()));
            let [remove, keep] = [gamma, density].map(|share: f64| (share * row as f64) as usize);
            order.iter().skip(remove).take(keep).for_each(|&i| want[r * row + i] = own[i]);
        }
        let got = breadcrumbs_rows(&x, row, density, gamma);
        assert_eq!(download(&got), want, "{rows} {row} {density} {gamma}");
    }
    // Of equal magnitudes as many are kept as of others.
    let equal = breadcrumbs_rows(&Tensor::ones(gpu(), [3, 10]), 10, 0.3, 0.2);
    assert!(download(&equal).chunks(10).all(|row| row.iter().sum::<f64>() == 3.0));
    // By a configuration, in parts that would cut rows.
    let folder = Folder::new("rows");
    let [a, b, _] = three(&folder);
    let text = "merge_method: breadcrumbs\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1, density: 0.5, gamma: 0.2}}]\nparameters: {mask: last_axis}\n";
    let merged = folder.merge_in_parts("out", text, 5 << 30, 10).unwrap();
    for (name, (shape, x)) in &a {
        let row = *shape.last().unwrap();
        let delta: Vec<f32> = b[name].1.iter().zip(x).map(|(b, a)| b - a).collect();
        let kept =
            download(&breadcrumbs_rows(&Tensor::from_slice(gpu(), &delta, [delta.len()]), row, 0.5, 0.2));
        let want: Vec<f64> = kept.iter().zip(x).map(|(d, a)| d + f64::from(*a)).collect();
        let got: Vec<f64> = values(&merged, name).into_iter().map(f64::from).collect();
        within(name, &got, &want, |_| 1e-6);
    }
    let message = folder.refusal(&text.replace("last_axis", "rows"));
    assert!(message.contains("`mask` must be tensor or last_axis"), "{message}");
}
