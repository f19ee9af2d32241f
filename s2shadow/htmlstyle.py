"""The style sheet of the page that ``htmlreport`` writes. Series in Okabe and Ito's colours, each at least 3:1 on its
background, and told apart by their dashes too."""

STYLE = """
:root {
  color-scheme: light dark;
  --back: #ffffff; --text: #1c2126; --soft: #5b6670; --line: #d9dee3; --box: #f4f6f8; --warning: #a13d00;
  --green: #008f68; --blue: #0072b2; --vermilion: #d55e00; --purple: #b8608f; --grey: #5b6670; --orange: #a87400;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14181c; --text: #e6e9ec; --soft: #a3adb6; --line: #333b43; --box: #1d2328; --warning: #ffa95c;
    --green: #1fb58a; --blue: #56b4e9; --vermilion: #e8702a; --purple: #cc79a7; --grey: #a3adb6; --orange: #e69f00;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
       overflow-wrap: anywhere; }
main { max-width: 66rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; }
.small { color: var(--soft); font-size: .875rem; }
.verdict { font-weight: 600; }
.warning { color: var(--warning); }
.scroll { overflow-x: auto; margin: .5rem 0; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--blue); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 500; }
tbody th { font-weight: 500; }
pre { white-space: pre-wrap; background: var(--box); padding: .6rem .8rem; border-radius: 4px; font-size: .875rem; }
summary { cursor: pointer; padding: .2rem 0; }
dl { margin: .3rem 0; font-size: .9rem; display: grid; grid-template-columns: minmax(6rem, max-content) 1fr;
     gap: .15rem .8rem; }
dt { color: var(--soft); }
dd { margin: 0; }
figure { margin: 1rem 0 1.5rem; }
figcaption { font-weight: 500; margin-bottom: .5rem; }
svg { display: block; width: 100%; overflow: visible; }
path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 1.75; }
.chart { display: grid; grid-template-columns: 3rem 1fr; }
.chart svg { height: 11rem; }
.chart .bottom { grid-column: 2; }
.left, .bottom { position: relative; color: var(--soft); font-size: .8rem; line-height: 1; }
.bottom { height: 1.2rem; margin-top: .35rem; }
span.top { position: absolute; right: .5rem; transform: translateY(-50%); white-space: nowrap; }
span.left { position: absolute; transform: translateX(-50%); white-space: nowrap; }
span.left.first { transform: none; }
span.left.last { transform: translateX(-100%); }
.latency { max-width: 44rem; }
.strip p { font-size: .875rem; margin: .5rem 0 .15rem; line-height: 1.3; }
.strip span { color: var(--soft); }
.strip svg { height: 1.5rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .875rem; color: var(--soft); }
.key { display: inline-block; width: 1.4rem; height: 0; margin-right: .4rem; vertical-align: .25em;
       border-top: 3px solid var(--c); }
.s0 { --c: var(--green); stroke: var(--c); }
.s1 { --c: var(--blue); stroke: var(--c); stroke-dasharray: 9 3 2 3; }
.s2 { --c: var(--vermilion); stroke: var(--c); }
.s3 { --c: var(--purple); stroke: var(--c); stroke-dasharray: 6 4; }
.s4 { --c: var(--grey); stroke: var(--c); }
.s5 { --c: var(--orange); stroke: var(--c); stroke-dasharray: 3 3; }
.key.s1, .key.s3 { border-top-style: dashed; }
.key.s5 { border-top-style: dotted; }
.grid { stroke: var(--line); stroke-width: 1; }
.mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
.tick { --c: var(--text); stroke: var(--text); stroke-width: 1; }
.key.tick { width: 0; height: .7rem; border-top: 0; border-left: 2px solid var(--c); vertical-align: -.1em; }
.range, path.point { stroke-dasharray: none; }
.range { stroke-width: 3; stroke-opacity: .45; }
path.p50 { stroke-width: 12; stroke-linecap: round; }
path.mean { stroke: var(--text); stroke-width: 6; stroke-linecap: round; }
path.p99 { stroke-width: 10; stroke-linecap: square; }
path.max { stroke-width: 3; }
i.point { display: inline-block; background: var(--soft); margin-right: .4rem; vertical-align: -.05em; }
i.p50 { width: 12px; height: 12px; border-radius: 6px; }
i.mean { width: 6px; height: 6px; border-radius: 3px; background: var(--text); vertical-align: .15em; }
i.p99 { width: 10px; height: 10px; }
i.max { width: 3px; height: 14px; }
.bar { fill: var(--c); stroke-dasharray: none; stroke-width: 1.5; }
.bar.needless { fill: none; }
"""
