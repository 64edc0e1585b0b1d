"""All texts of the web page, in four languages.

The browser translates the initial texts of the page. The server translates later ones into the
language that the browser requests. Both use this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

LANGUAGES: Final = ("en", "zh-CN", "zh-TW", "ja")

_TRADITIONAL: Final = ("zh-tw", "zh-hk", "zh-mo", "zh-hant")

# Edits that the demo checkpoint does well, in the order of the buttons.
DEMO_EXAMPLES: Final = ("bw", "sketch", "night", "sepia", "painting", "autumn", "pink", "fog")
EXAMPLES: Final = ("hat", "sketch", "night", "snow", "background", "remove")

# In the order of LANGUAGES.
_TABLE: Final[Mapping[str, tuple[str, str, str, str]]] = {
    "tab.edit": ("Edit", "编辑", "編輯", "編集"),
    "tab.region": ("Edit a region", "局部编辑", "局部編輯", "範囲を編集"),
    "tab.batch": ("Batch", "批量", "批次", "一括"),
    "tab.system": ("System", "系统", "系統", "システム"),
    "picture": ("Picture", "图片", "圖片", "画像"),
    "pictures": ("Pictures", "图片", "圖片", "画像"),
    "mask": (
        "Paint over what may change",
        "涂抹允许修改的区域",
        "塗抹允許修改的區域",
        "変更してよい部分を塗る",
    ),
    "prompt": ("What to change", "要怎么修改", "要怎麼修改", "どう変えるか"),
    "prompt.hint": (
        "Say it in plain words, e.g. “turn it into a pencil sketch”",
        "用一句话说明，例如“变成铅笔素描”",
        "用一句話說明，例如「變成鉛筆素描」",
        "ふつうの言葉で。例：「鉛筆スケッチにして」",
    ),
    "settings.taken": (
        "Settings of {name} taken from the picture. To edit this picture itself, choose another "
        "seed than {seed}.",
        "已采用图片 {name} 中记录的设置。若要编辑这张图片本身，请换用 {seed} 以外的种子。",
        "已採用圖片 {name} 中記錄的設定。若要編輯這張圖片本身，請改用 {seed} 以外的種子。",
        "{name} に記録された設定を読み込みました。この画像自体を編集するときは、"
        "{seed} 以外のシード値を選んでください。",
    ),
    "advanced": ("Advanced", "高级选项", "進階選項", "詳細設定"),
    "num_steps": ("Steps", "步数", "步數", "ステップ数"),
    "guidance_scale": ("Guidance", "引导强度", "引導強度", "ガイダンス"),
    "size_level": ("Working size", "处理尺寸", "處理尺寸", "処理サイズ"),
    "mode": ("Quality", "质量", "品質", "品質"),
    "mode.exact": ("Best", "最佳", "最佳", "最高"),
    "mode.fast": ("Good", "良好", "良好", "良好"),
    "mode.turbo": ("Fast", "快速", "快速", "速さ優先"),
    "mode.timed": (
        "{mode} · ≈ {seconds} s",
        "{mode} · 约 {seconds} 秒",
        "{mode} · 約 {seconds} 秒",
        "{mode} · 約 {seconds} 秒",
    ),
    "mode.hint": (
        "Good skips about half of the steps, Fast about 60 %; the differences are small",
        "“良好”省去约一半的计算，“快速”约六成；差别很小",
        "「良好」省去約一半的計算，「快速」約六成；差別很小",
        "「良好」は計算の約半分、「速さ優先」は約 6 割を省きます。違いはわずかです",
    ),
    "seed": ("Seed", "随机种子", "隨機種子", "シード値"),
    "seed.hint": (
        "−1 picks a random seed; the same seed gives the same picture",
        "−1 为随机；种子相同，结果相同",
        "−1 為隨機；種子相同，結果相同",
        "−1 で自動。同じ値なら同じ結果",
    ),
    "negative_prompt": ("What to avoid", "不想出现的内容", "不想出現的內容", "避けたいもの"),
    "loras": ("LoRAs", "LoRA", "LoRA", "LoRA"),
    "loras.hint": (
        "Choose, or type name:strength with a strength from −4 to 4",
        "选择，或输入 名称:强度（强度为 −4 到 4）",
        "選擇，或輸入 名稱:強度（強度為 −4 到 4）",
        "選ぶか、「名前:強さ」（−4～4）と入力",
    ),
    "thinking": (
        "Think first",
        "先思考",
        "先思考",
        "先に考える",
    ),
    "thinking.hint": (
        "The model rewrites the prompt in clearer words before it edits",
        "模型先把指令改写得更清楚，再开始编辑",
        "模型先把指令改寫得更清楚，再開始編輯",
        "モデルが指示をわかりやすく書き直してから編集",
    ),
    "reflection": (
        "Judge and try again",
        "检查并重试",
        "檢查並重試",
        "見直してやり直す",
    ),
    "reflection.hint": (
        "Keeps the best of several rounds; takes several times as long",
        "编辑数轮，取最好的一张；用时会成倍增加",
        "編輯數輪，取最好的一張；耗時會成倍增加",
        "数回試して一番よいものを採用。時間は数倍かかります",
    ),
    "reflection_rounds": (
        "Rounds at most",
        "最多轮数",
        "最多輪數",
        "最大回数",
    ),
    "reflection_rounds.hint": (
        "1 judges the result without trying again",
        "1 表示只检查，不重试",
        "1 表示只檢查，不重試",
        "1 は見直すだけで、やり直しません",
    ),
    "region": (
        "Detail of the region",
        "局部精度",
        "局部精細度",
        "範囲の細かさ",
    ),
    "region.whole": ("Usual", "普通", "普通", "標準"),
    "region.full": ("Full", "精细", "精細", "高精細"),
    "region.hint": (
        "Full edits only the painted part and its surroundings, enlarged, for more detail",
        "“精细”只放大编辑涂抹的部分及其周围，细节更多",
        "「精細」只放大編輯塗抹的部分及其周圍，細節更多",
        "「高精細」は塗った部分とその周りだけを拡大して編集し、細部がよりよく出ます",
    ),
    "outpaint": (
        "Enlarge the canvas",
        "扩展画布",
        "擴展畫布",
        "キャンバスを広げる",
    ),
    "outpaint.hint": (
        "Pixels or percent: 25% on every side, or 0 256 0 256 for top, right, bottom, left; "
        "the old pixels stay as they are",
        "像素或百分比：25% 表示四边，0 256 0 256 依次为上、右、下、左；原有像素不变",
        "像素或百分比：25% 表示四邊，0 256 0 256 依序為上、右、下、左；原有像素不變",
        "ピクセルまたは %。25% は全辺、0 256 0 256 は上・右・下・左。元の画素は変わりません",
    ),
    "upscale": ("Enlarge the result", "放大结果", "放大結果", "結果を拡大"),
    "upscale.hint": (
        "How many times along each side; 1: the size stays",
        "每边放大的倍数；1 表示尺寸不变",
        "每邊放大的倍數；1 表示尺寸不變",
        "各辺の倍率。1 なら大きさはそのまま",
    ),
    "reasoning.needs": (
        "Needs Step1X-Edit v1.2",
        "需要 Step1X-Edit v1.2",
        "需要 Step1X-Edit v1.2",
        "Step1X-Edit v1.2 が必要",
    ),
    "reasoning": (
        "What the model thought",
        "模型的思考",
        "模型的思考",
        "モデルが考えたこと",
    ),
    "rewritten": ("Rewritten prompt", "改写后的指令", "改寫後的指令", "書き直された指示"),
    "rounds": ("Rounds", "各轮结果", "各輪結果", "各回の結果"),
    "verdicts": ("Verdicts", "评价", "評價", "評価"),
    "suggested.use": ("Use these", "采用", "採用", "この値を使う"),
    "run": ("Edit", "开始编辑", "開始編輯", "編集する"),
    "run.batch": ("Edit all", "全部编辑", "全部編輯", "すべて編集"),
    "stop": ("Stop", "停止", "停止", "中止"),
    "result": ("Before and after", "修改前后", "修改前後", "変更前と変更後"),
    "results": ("Results", "结果", "結果", "結果"),
    "results.file": ("All results (zip)", "全部结果（zip）", "全部結果（zip）", "結果一式（zip）"),
    "download": ("Download PNG", "下载 PNG", "下載 PNG", "PNG をダウンロード"),
    "reuse": ("Use as input", "用作输入", "作為輸入", "入力にする"),
    "again": ("Again, new seed", "换个种子再来", "換個種子再來", "別のシードでもう一度"),
    "history": (
        "History of this tab",
        "本页的历史",
        "本頁的紀錄",
        "このタブの履歴",
    ),
    "history.kept": ("History", "历史", "紀錄", "履歴"),
    "undo": ("Undo", "撤销", "復原", "元に戻す"),
    "merge": ("From the original", "从原图重新编辑", "從原圖重新編輯", "元の画像からやり直す"),
    "against": ("Compare with", "对比对象", "對比對象", "比較する相手"),
    "delete": ("Delete …", "删除…", "刪除…", "削除…"),
    "delete.sure": (
        "Delete what? This cannot be undone.",
        "要删除什么？删除后无法恢复。",
        "要刪除什麼？刪除後無法復原。",
        "何を削除しますか。元に戻せません。",
    ),
    "delete.step": (
        "This step and all that were made from it",
        "此步骤以及由它产生的所有步骤",
        "此步驟以及由它產生的所有步驟",
        "このステップと、そこから作られたすべて",
    ),
    "delete.all": ("The whole history", "全部历史", "全部紀錄", "履歴のすべて"),
    "delete.nothing": ("Nothing", "不删除", "不刪除", "削除しない"),
    "deleted": (
        "Steps deleted: {steps}",
        "已删除 {steps} 个步骤",
        "已刪除 {steps} 個步驟",
        "{steps} 件のステップを削除しました",
    ),
    "photo": ("Try the example photo", "使用示例照片", "使用範例照片", "サンプル写真を使う"),
    "offload": ("Offload from the GPU", "移出显存", "移出顯示記憶體", "GPU から退避"),
    "release": ("Release all memory", "释放全部内存", "釋放所有記憶體", "メモリをすべて解放"),
    "models": ("Published models", "官方发布的模型", "官方發布的模型", "公開モデル"),
    "models.fetch": ("Fetch", "下载", "下載", "ダウンロード"),
    "edit.bw": ("make it black and white", "变成黑白照片", "變成黑白照片", "白黒にして"),
    "edit.sketch": (
        "turn it into a pencil sketch",
        "变成铅笔素描",
        "變成鉛筆素描",
        "鉛筆スケッチにして",
    ),
    "edit.night": ("make it night", "变成夜晚", "變成夜晚", "夜にして"),
    "edit.sepia": ("make it sepia", "变成怀旧的棕褐色", "變成懷舊的棕褐色", "セピア色にして"),
    "edit.painting": ("turn it into a painting", "变成油画", "變成油畫", "絵画風にして"),
    "edit.autumn": ("make it autumn", "变成秋天", "變成秋天", "秋にして"),
    "edit.pink": ("make it pink", "变成粉红色", "變成粉紅色", "ピンク色にして"),
    "edit.fog": ("add fog", "加上雾气", "加上霧氣", "霧を加えて"),
    "edit.hat": ("add a red hat", "加一顶红色的帽子", "加一頂紅色的帽子", "赤い帽子を加えて"),
    "edit.snow": ("let it snow", "让天空下雪", "讓天空下雪", "雪を降らせて"),
    "edit.background": (
        "replace the background with a beach",
        "把背景换成海滩",
        "把背景換成海灘",
        "背景を海辺に変えて",
    ),
    "edit.remove": (
        "remove the people in the background",
        "去掉背景里的人",
        "去掉背景裡的人",
        "背景の人を消して",
    ),
    "demo.badge": ("Demo model", "演示模型", "示範模型", "デモモデル"),
    "demo.about": (
        "This small built-in model is a demonstration and knows only colours, moods and simple "
        "styles like those below. The real Step1X-Edit can be fetched under System.",
        "这是内置的小型演示模型，只会下面这类颜色、氛围和简单风格的修改；"
        "真正的 Step1X-Edit 可在“系统”中下载。",
        "這是內建的小型示範模型，只會下面這類顏色、氛圍和簡單風格的修改；"
        "真正的 Step1X-Edit 可在「系統」中下載。",
        "これは内蔵の小さなデモモデルで、下のような色・雰囲気・簡単な画風の変更しかできません。"
        "本物の Step1X-Edit は「システム」でダウンロードできます。",
    ),
    "before": ("Before", "修改前", "修改前", "変更前"),
    "after": ("After", "修改后", "修改後", "変更後"),
    "preview": ("Preview", "预览", "預覽", "プレビュー"),
    "alt.before": (
        "The picture before the edit",
        "修改前的图片",
        "修改前的圖片",
        "変更前の画像",
    ),
    "alt.after": ("The edited picture", "修改后的图片", "修改後的圖片", "編集した画像"),
    "alt.preview": (
        "A preview of the edit",
        "修改结果的预览",
        "修改結果的預覽",
        "編集途中のプレビュー",
    ),
    "slider": (
        "How much of the picture before the edit is shown",
        "显示多少修改前的图片",
        "顯示多少修改前的圖片",
        "変更前の画像を表示する割合",
    ),
    "fullscreen": ("Full screen", "全屏", "全螢幕", "全画面"),
    # --- texts of the page's own script ----------------------------------------------------------
    "page.about": (
        "Edit pictures by saying what to change",
        "说出要怎么修改，就能编辑图片",
        "說出要怎麼修改，就能編輯圖片",
        "言葉で伝えるだけで画像を編集",
    ),
    "page.blocked": (
        "The page cannot be loaded. A proxy in front of the server must pass on the Host header "
        "(nginx: proxy_set_header Host $host), and ALLOWED_HOSTS must contain that name.",
        "无法加载页面。服务器前面的代理必须转发 Host 请求头（nginx：proxy_set_header Host $host），"
        "并且 ALLOWED_HOSTS 要包含该名称。",
        "無法載入頁面。伺服器前面的代理必須轉送 Host 標頭（nginx：proxy_set_header Host $host），"
        "且 ALLOWED_HOSTS 要包含該名稱。",
        "ページを読み込めません。サーバーの前のプロキシは Host ヘッダーをそのまま渡し"
        "（nginx：proxy_set_header Host $host）、ALLOWED_HOSTS にその名前を入れてください。",
    ),
    "page.restarted": (
        "The server was restarted.",
        "服务器已重新启动。",
        "伺服器已重新啟動。",
        "サーバーが再起動しました。",
    ),
    "page.lost": (
        "Your pictures were not kept: choose them again.",
        "之前的图片已不在，请重新选择。",
        "之前的圖片已不在，請重新選擇。",
        "画像は残っていないので、選び直してください。",
    ),
    "page.disconnected": (
        "The server does not answer. The page keeps trying to reconnect.",
        "服务器没有响应。页面会不断重试，直到恢复连接。",
        "伺服器沒有回應。頁面會不斷重試，直到恢復連線。",
        "サーバーが応答しません。つながるまで、このページは再試行を続けます。",
    ),
    "page.offline": ("No connection", "未连接", "未連線", "未接続"),
    "against.source": ("the picture before this edit", "本次修改前", "本次修改前", "この編集の前"),
    "against.original": ("the original", "原图", "原圖", "元の画像"),
    # --- texts of the server --------------------------------------------------------------------
    "no_picture": (
        "Choose a picture first.",
        "请先选择一张图片。",
        "請先選擇一張圖片。",
        "先に画像を選んでください。",
    ),
    "no_prompt": (
        "Say what to change first.",
        "请先说明要怎么修改。",
        "請先說明要怎麼修改。",
        "先にどう変えるかを書いてください。",
    ),
    "no_mask": (
        "Paint over what may change first.",
        "请先涂抹允许修改的区域。",
        "請先塗抹允許修改的區域。",
        "先に変更してよい部分を塗ってください。",
    ),
    "unknown_edit": (
        "The demo model does not know this edit, so the picture hardly changes. Try one of "
        "the examples, or fetch the real model under System.",
        "演示模型不会这种修改，图片会几乎不变。请试试上面的示例，或在“系统”中下载真正的模型。",
        "示範模型不會這種修改，圖片會幾乎不變。請試試上面的範例，或在「系統」中下載真正的模型。",
        "デモモデルはこの編集を知らないため、画像はほとんど変わりません。例を試すか、"
        "「システム」で本物のモデルをダウンロードしてください。",
    ),
    "slow_edit": (
        "This edit may be stopped before it is done: choose fewer steps or a smaller working size.",
        "此次编辑可能在完成前被终止：请减少步数或选择较小的处理尺寸。",
        "此次編輯可能在完成前被終止：請減少步數或選擇較小的處理尺寸。",
        "この編集は完了前に打ち切られる可能性があります。ステップ数か処理サイズを小さくしてください。",
    ),
    "stopped": ("Stopped.", "已停止。", "已停止。", "中止しました。"),
    "done": (
        "Done in {seconds} s · seed {seed}",
        "完成，用时 {seconds} 秒 · 种子 {seed}",
        "完成，耗時 {seconds} 秒 · 種子 {seed}",
        "完了（{seconds} 秒）· シード値 {seed}",
    ),
    "changed": (
        "{share} % of the picture changed",
        "改动了图片的 {share} %",
        "改動了圖片的 {share} %",
        "画像の {share} % を変更",
    ),
    "step": ("Seed {seed}", "种子 {seed}", "種子 {seed}", "シード値 {seed}"),
    "drift": (
        "the rest moved {levels} levels",
        "其余部分平均变化 {levels} 级",
        "其餘部分平均變化 {levels} 階",
        "ほかの部分の変化は平均 {levels} 階調",
    ),
    "against.drift": (
        "the rest differs by {levels} levels",
        "其余部分平均相差 {levels} 级",
        "其餘部分平均相差 {levels} 階",
        "ほかの部分の差は平均 {levels} 階調",
    ),
    "not_kept": (
        "This result is not kept in the history; the server’s log says why.",
        "此结果未存入历史，原因见服务器日志。",
        "此結果未存入紀錄，原因見伺服器日誌。",
        "この結果は履歴に残りません。理由はサーバーのログにあります。",
    ),
    "phase.queued": (
        "Waiting, position {step}",
        "排队中，第 {step} 位",
        "排隊中，第 {step} 位",
        "待機中（{step} 番目）",
    ),
    "phase.starting": (
        "Starting a replica",
        "正在启动副本",
        "正在啟動副本",
        "レプリカを起動中",
    ),
    "phase.loading": ("Loading the model", "正在加载模型", "正在載入模型", "モデルを読み込み中"),
    "phase.reading": (
        "Reading the model, {read} of {size} GB",
        "正在读取模型，{read} / {size} GB",
        "正在讀取模型，{read} / {size} GB",
        "モデルを読み取り中（{read} / {size} GB）",
    ),
    "phase.thinking": (
        "Thinking about the prompt",
        "正在思考指令",
        "正在思考指令",
        "指示について考え中",
    ),
    "phase.encoding": (
        "Reading picture and text",
        "正在理解图片和文字",
        "正在理解圖片和文字",
        "画像と文を読み取り中",
    ),
    "phase.denoising": (
        "Step {step} of {total}",
        "第 {step} 步，共 {total} 步",
        "第 {step} 步，共 {total} 步",
        "ステップ {step} / {total}",
    ),
    "phase.decoding": ("Drawing the result", "正在生成图片", "正在產生圖片", "画像を生成中"),
    "phase.reflecting": (
        "Looking at the result",
        "正在检查结果",
        "正在檢查結果",
        "結果を見直し中",
    ),
    "phase.upscaling": (
        "Enlarging the result",
        "正在放大结果",
        "正在放大結果",
        "結果を拡大中",
    ),
    "phase.saving": ("Saving", "正在保存", "正在儲存", "保存中"),
    "model.available": ("not fetched", "未下载", "未下載", "未ダウンロード"),
    "model.partial": ("begun", "已下载一部分", "已下載一部分", "途中まで"),
    "model.pulled": ("fetched", "已下载", "已下載", "ダウンロード済み"),
    "model.running": ("being fetched", "正在下载", "正在下載", "ダウンロード中"),
    "model.runs": ("in use", "使用中", "使用中", "使用中"),
    "model.here": (
        "{name} is on this disk. To use it, restart the server with",
        "{name} 已在本机。要使用它，请用以下设置重新启动服务器：",
        "{name} 已在本機。要使用它，請用以下設定重新啟動伺服器：",
        "{name} はこのマシンにあります。使うには次の設定でサーバーを起動し直してください：",
    ),
    "pull.asking": (
        "Asking the hub",
        "正在查询文件列表",
        "正在查詢檔案清單",
        "ファイル一覧を問い合わせ中",
    ),
    "pull.downloading": ("Fetching", "正在下载", "正在下載", "ダウンロード中"),
    "pull.checking": ("Checking", "正在校验", "正在校驗", "検証中"),
    "pull.waiting": (
        "Interrupted, retrying soon",
        "连接中断，稍后重试",
        "連線中斷，稍後重試",
        "中断したため、まもなく再試行",
    ),
    "pull.stopping": ("Stopping", "正在停止", "正在停止", "停止中"),
    "pull.stopped": (
        "Stopped. The downloaded part is kept, and Fetch continues from it.",
        "已停止。已下载的部分会保留，再次下载时从那里继续。",
        "已停止。已下載的部分會保留，再次下載時從那裡繼續。",
        "中止しました。受け取った分は残り、次のダウンロードはそこから続きます。",
    ),
    "amount": (
        "{done} of {total} {unit}",
        "{done} / {total} {unit}",
        "{done} / {total} {unit}",
        "{done} / {total} {unit}",
    ),
    "left": (
        "about {seconds} s left",
        "约剩 {seconds} 秒",
        "約剩 {seconds} 秒",
        "残り約 {seconds} 秒",
    ),
    "round": ("Round {number}", "第 {number} 轮", "第 {number} 輪", "{number} 回目"),
    "round.score": ("score {score}", "得分 {score}", "得分 {score}", "評点 {score}"),
    "round.best": ("best", "最佳", "最佳", "最良"),
    "of_batch": (
        "Picture {number} of {total}",
        "第 {number} 张，共 {total} 张",
        "第 {number} 張，共 {total} 張",
        "{number} 枚目 / {total} 枚",
    ),
    "batch.done": (
        "{successes} of {total} edited",
        "已编辑 {successes} / {total} 张",
        "已編輯 {successes} / {total} 張",
        "{total} 枚中 {successes} 枚を編集",
    ),
    "at.Unloaded": ("Model not loaded", "模型未加载", "模型未載入", "モデル未読み込み"),
    "at.CPU": ("Model in memory", "模型在内存", "模型在記憶體", "モデルはメモリ上"),
    "at.GPU": ("Model on the GPU", "模型在 GPU", "模型在 GPU", "モデルは GPU 上"),
    "editing": ("Editing", "正在编辑", "正在編輯", "編集中"),
    "waiting": ("{length} waiting", "{length} 个在排队", "{length} 個在排隊", "{length} 件待ち"),
    "status.location": ("Location", "位置", "位置", "場所"),
    "status.model": ("Model", "模型", "模型", "モデル"),
    "status.device": ("Device", "设备", "裝置", "デバイス"),
    "status.memory": ("GPU memory", "显存", "顯示記憶體", "GPU メモリ"),
    "status.idle": ("Idle", "空闲", "閒置", "アイドル"),
    "status.queue": ("Waiting edits", "等待的任务", "等待的工作", "待機中の編集"),
    "status.loads": ("Loads", "加载次数", "載入次數", "読み込み回数"),
    "status.moves": (
        "Moves to / from the GPU",
        "移入 / 移出 GPU",
        "移入 / 移出 GPU",
        "GPU への移動 / 退避",
    ),
    "status.loras": ("LoRAs in the model", "模型中的 LoRA", "模型中的 LoRA", "モデル内の LoRA"),
    "memory": (
        "{allocated} GB used, {reserved} GB reserved",
        "已用 {allocated} GB，占有 {reserved} GB",
        "已用 {allocated} GB，占有 {reserved} GB",
        "使用 {allocated} GB、確保 {reserved} GB",
    ),
    "status.plan": ("Memory plan", "内存方案", "記憶體方案", "メモリ計画"),
    "status.peak": ("Peak of an edit", "单次编辑的峰值", "單次編輯的峰值", "編集時のピーク"),
    "status.host": ("Weights in memory", "内存中的权重", "記憶體中的權重", "メモリ上の重み"),
    "plan.fits": (
        "everything stays on the GPU",
        "全部留在 GPU",
        "全部留在 GPU",
        "すべて GPU に置く",
    ),
    "plan.streams": (
        "{share} % of the core stays on the GPU, the rest passes through {slots} slots",
        "核心的 {share} % 留在 GPU，其余经 {slots} 个槽位流过",
        "核心的 {share} % 留在 GPU，其餘經 {slots} 個槽位流過",
        "中核の {share} % を GPU に置き、残りは {slots} 個のスロットを通す",
    ),
    "plan.host": (
        "the model runs in host memory",
        "模型在内存中运算",
        "模型在記憶體中運算",
        "モデルはメモリ上で計算",
    ),
    "peak.predicted": ("planned {gb} GB", "预计 {gb} GB", "預計 {gb} GB", "予測 {gb} GB"),
    "peak.measured": ("measured {gb} GB", "实测 {gb} GB", "實測 {gb} GB", "実測 {gb} GB"),
    "suggested": (
        "This model’s authors suggest {num_steps} steps and guidance {guidance_scale}.",
        "此模型的作者建议 {num_steps} 步、引导强度 {guidance_scale}。",
        "此模型的作者建議 {num_steps} 步、引導強度 {guidance_scale}。",
        "このモデルの作者の推奨：{num_steps} ステップ、ガイダンス {guidance_scale}。",
    ),
    "idle.until": (
        "{seconds} s; leaves the GPU after {timeout} s",
        "{seconds} 秒；{timeout} 秒后移出 GPU",
        "{seconds} 秒；{timeout} 秒後移出 GPU",
        "{seconds} 秒（{timeout} 秒で GPU から退避）",
    ),
    "idle.host": ("{seconds} s", "{seconds} 秒", "{seconds} 秒", "{seconds} 秒"),
    "idle.stays": (
        "{seconds} s; stays on the GPU",
        "{seconds} 秒；一直留在 GPU",
        "{seconds} 秒；一直留在 GPU",
        "{seconds} 秒（GPU に残ります）",
    ),
    # --- errors, by their code; the details follow in English -----------------------------------
    "error.invalid_parameter": (
        "A setting of this edit is not valid.",
        "这次编辑的某个设置不可用。",
        "這次編輯的某個設定不可用。",
        "この編集の設定に使えない値があります。",
    ),
    "error.file_not_found": (
        "The picture no longer exists. Choose it again.",
        "图片已不在，请重新选择。",
        "圖片已不在，請重新選擇。",
        "画像がもうありません。選び直してください。",
    ),
    "error.path_not_allowed": (
        "This file may not be used. Choose the picture again.",
        "不允许使用此文件，请重新选择图片。",
        "不允許使用此檔案，請重新選擇圖片。",
        "このファイルは使えません。画像を選び直してください。",
    ),
    "error.unsupported_image": (
        "This file is not a picture in a format that can be read.",
        "此文件不是可读取格式的图片。",
        "此檔案不是可讀取格式的圖片。",
        "このファイルは読み込める形式の画像ではありません。",
    ),
    "error.corrupt_image": (
        "This picture is damaged or incomplete.",
        "图片已损坏或不完整。",
        "圖片已損壞或不完整。",
        "画像が壊れているか、途中で切れています。",
    ),
    "error.image_too_large": (
        "This picture is too large.",
        "图片太大。",
        "圖片太大。",
        "画像が大きすぎます。",
    ),
    "error.image_too_small": (
        "This picture is too small.",
        "图片太小。",
        "圖片太小。",
        "画像が小さすぎます。",
    ),
    "error.image_aspect": (
        "This picture is too long and narrow.",
        "图片过于细长。",
        "圖片過於細長。",
        "画像が細長すぎます。",
    ),
    "error.no_recipe": (
        "This picture does not say how it was made.",
        "这张图片没有记录它的制作方式。",
        "這張圖片沒有記錄它的製作方式。",
        "この画像には作り方の記録がありません。",
    ),
    "error.output_exists": (
        "A file with this name already exists.",
        "已有同名文件。",
        "已有同名檔案。",
        "同じ名前のファイルがすでにあります。",
    ),
    "error.output_not_writable": (
        "The result cannot be written.",
        "无法写入结果。",
        "無法寫入結果。",
        "結果を書き込めません。",
    ),
    "error.no_space": (
        "The server’s disk is full.",
        "服务器磁盘已满。",
        "伺服器磁碟已滿。",
        "サーバーのディスクがいっぱいです。",
    ),
    "error.queue_full": (
        "The server is busy. Try again soon.",
        "服务器正忙，请稍后再试。",
        "伺服器忙碌中，請稍後再試。",
        "サーバーが混み合っています。しばらくしてからもう一度お試しください。",
    ),
    "error.rate_limited": (
        "Too many requests. Try again soon.",
        "请求过多，请稍后再试。",
        "請求過多，請稍後再試。",
        "リクエストが多すぎます。しばらくしてからもう一度お試しください。",
    ),
    "error.shutting_down": (
        "The server is stopping.",
        "服务器正在关闭。",
        "伺服器正在關閉。",
        "サーバーは終了処理中です。",
    ),
    "error.out_of_memory": (
        "There is not enough memory for this edit. Choose a smaller working size under Advanced.",
        "内存不足，请在高级选项中选择较小的处理尺寸。",
        "記憶體不足，請在進階選項中選擇較小的處理尺寸。",
        "メモリが足りません。詳細設定で小さい処理サイズを選んでください。",
    ),
    "error.model_unavailable": (
        "No usable model is available.",
        "没有可用的模型。",
        "沒有可用的模型。",
        "使えるモデルがありません。",
    ),
    "error.fetch": (
        "The model could not be fetched.",
        "无法下载模型。",
        "無法下載模型。",
        "モデルをダウンロードできませんでした。",
    ),
    "error.model_not_found": (
        "There is no model with this name.",
        "没有此名称的模型。",
        "沒有此名稱的模型。",
        "この名前のモデルはありません。",
    ),
    "error.idempotency_key": (
        "This request was already sent.",
        "此请求已发送过。",
        "此請求已送出過。",
        "このリクエストはすでに送信されています。",
    ),
    "error.cancelled": ("Stopped.", "已停止。", "已停止。", "中止しました。"),
    "error.deadline_exceeded": (
        "This takes longer than allowed.",
        "所需时间超出限制。",
        "所需時間超出限制。",
        "所要時間が上限を超えています。",
    ),
    "error.invalid_settings": (
        "The server’s settings do not allow this.",
        "服务器的设置不允许此操作。",
        "伺服器的設定不允許此操作。",
        "サーバーの設定では許可されていません。",
    ),
    "error.worker_lost": (
        "The model’s process ended unexpectedly. Try again.",
        "模型进程已中断，请重试。",
        "模型行程已中斷，請重試。",
        "モデルのプロセスが終了しました。もう一度お試しください。",
    ),
    "error.job_conflict": (
        "This is not possible now.",
        "现在无法执行此操作。",
        "現在無法執行此操作。",
        "今はできません。",
    ),
    "error.not_found": (
        "This no longer exists.",
        "该项已不存在。",
        "該項已不存在。",
        "もう存在しません。",
    ),
    "error.interrupted": (
        "The server stopped during the edit. Try again.",
        "服务器中途停止，请重试。",
        "伺服器中途停止，請重試。",
        "サーバーが途中で終了しました。もう一度お試しください。",
    ),
    "error.internal": (
        "Something went wrong in the server.",
        "服务器内部出错。",
        "伺服器內部出錯。",
        "サーバー内部でエラーが発生しました。",
    ),
}


def translations() -> dict[str, dict[str, str]]:
    """The table by language."""
    return {
        language: {key: texts[index] for key, texts in _TABLE.items()}
        for index, language in enumerate(LANGUAGES)
    }


def language_of(accepted: str) -> str:
    """The first known language in the value of an Accept-Language header, or English."""
    for part in accepted.lower().split(","):
        tag = part.partition(";")[0].strip()
        if tag.startswith("zh"):
            return "zh-TW" if tag.startswith(_TRADITIONAL) else "zh-CN"
        if tag[:2] in ("en", "ja"):
            return tag[:2]
    return "en"


def has_text(key: str) -> bool:
    """Whether the table has a text for this key."""
    return key in _TABLE


def text(key: str, language: str, **values: object) -> str:
    """One text in this language, with its values filled in."""
    return _TABLE[key][LANGUAGES.index(language)].format(**values)
